"""``understudy``: the operator's command; one sub-command per noun."""

import sys

import typer

from appliance.cli import agent, export, lab, machines, mount, pki, points, verify
from daemon.service import fail
from replication.errors import ReplicationError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Understudy replicates machines to a second site and brings them up there.",
)
app.add_typer(pki.app, name="pki")
app.add_typer(agent.app, name="agent")
for command in (
    machines.machines,
    points.points,
    mount.mount,
    export.export,
    verify.verify,
):
    app.command()(command)
lab.register(app)


@app.callback()
def understudy() -> None:
    """Replicate machines to a second site and bring them up there."""


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        app()
    except ReplicationError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

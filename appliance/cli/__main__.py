"""``understudy``: the operator's command; `commands` lists its sub-commands."""

import os
import sys

import typer

from appliance.cli.commands import Commands
from replication.errors import ReplicationError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Understudy replicates machines to a second site and brings them up there.",
)


@app.callback()
def understudy() -> None:
    """Replicate machines to a second site and bring them up there."""


def main() -> int:
    """Run the command line and return the exit code."""
    try:
        app()
    except ReplicationError as error:
        from daemon.service import fail  # noqa: PLC0415 - brings a web server along

        return fail(error)
    except BrokenPipeError:
        # Whoever read our output has enough of it, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())

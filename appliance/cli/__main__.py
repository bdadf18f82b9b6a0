"""``understudy``: the operator's command; `commands` lists its sub-commands."""

import os
import sys
from importlib import metadata
from typing import Annotated

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


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"understudy {metadata.version('understudy')}")
        raise typer.Exit


@app.callback()
def understudy(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Tell the version."),
    ] = False,
) -> None:
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

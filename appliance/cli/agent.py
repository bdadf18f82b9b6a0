"""``understudy agent``: what the agent of this machine says of itself."""

import json
import os
from typing import Annotated, Any

import typer

from appliance.cli.output import (
    AsJson,
    Column,
    instant,
    mebibytes,
    print_json,
    print_rows,
    printable,
)
from replication.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="The mobility agent of this machine.")

STATUS_FILE = "status.json"
LOOKED_FOR = (
    "/var/lib/understudy-agent",
    "/run/understudy-agent",
    "/var/lib/understudy-lab/agents",
)
RECORDS_SHOWN = 10


@app.callback()
def agent() -> None:
    """The mobility agent of this machine."""


@app.command()
def status(
    *,
    state_folder: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The agent's state_folder; looked for if not given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Tell how far replication is, what is to do, and the newest changesets."""
    found = _find(state_folder)
    if as_json:
        print_json(found)
        return
    for news in found:
        _tell(news)


def _find(folder: str | None) -> list[dict[str, Any]]:
    found = []
    for root in (folder,) if folder else LOOKED_FOR:
        for path, _, files in os.walk(root):
            if STATUS_FILE in files:
                with open(os.path.join(path, STATUS_FILE), encoding="utf-8") as file:
                    found.append(json.load(file))
    if not found:
        raise ConfigError(
            f"no agent has told of itself in {folder or ' or '.join(LOOKED_FOR)}",
            hint="name its state folder with --state-folder",
        )
    return sorted(found, key=lambda news: str(news["name"]))


def _tell(news: dict[str, Any]) -> None:
    alive = os.path.exists(f"/proc/{news['pid']}")
    typer.secho(printable(news["name"] or news["machine"]), bold=True, nl=False)
    typer.echo(
        f"  {news['state'] if alive else 'the agent does not run'}, tracker {news['tracker']}"
    )
    if news["trouble"]:
        typer.secho(f"  {printable(news['trouble'])}", fg="red")
    disks = ", ".join(f"{disk['name']} {mebibytes(disk['size_bytes'])}" for disk in news["disks"])
    typer.echo(f"  disks      {printable(disks)}")
    typer.echo(
        f"  stream     committed {news['committed']}, applied {news['applied']}, "
        f"{news['unapplied_count']} changesets kept until applied"
    )
    typer.echo(f"  to do      {mebibytes(news['todo_bytes'])}")
    typer.echo(f"  durable    {instant(news['durable_ns'])}")
    typer.echo(f"  restorable {instant(news['restorable_ns'])}")
    print_rows(
        news["records"][-RECORDS_SHOWN:],
        (
            Column("  changeset", "changeset", lambda stamp: f"  {stamp}"),
            Column("at", "time_ns", lambda found: instant(found)[11:]),
            Column("consistency", "consistency"),
            Column("changed", "changed_bytes", mebibytes, right=True),
            Column("sent", "sent_bytes", mebibytes, right=True),
            Column("frozen", "pause_seconds", lambda found: f"{found * 1000:.0f} ms", right=True),
            Column("taken in", "taken_seconds", lambda found: f"{found:.1f} s", right=True),
            Column("why not better", "reason", wraps=True),
        ),
        as_json=False,
        none="  no changeset yet",
    )

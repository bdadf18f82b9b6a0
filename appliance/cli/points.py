"""``understudy points``: the recovery points of a machine.

Asks the config server; with ``--store``, or where nobody is signed in, reads an applier's store.
"""

import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect, part
from appliance.cli.default_group import DEFAULT, DefaultGroup
from appliance.cli.names import MachineName, Store, parse_duration
from appliance.cli.output import (
    AsJson,
    Column,
    counted,
    instant,
    mebibytes,
    print_json,
    print_line,
    print_rows,
    size,
    span,
)
from appliance.cli.sign_in import find_sign_in
from replication.errors import ConfigError

app = typer.Typer(cls=DefaultGroup, help="A machine's recovery points.")


@app.command(DEFAULT)
def list_points(machine: MachineName, *, store: Store = None, as_json: AsJson = False) -> None:
    """List a machine's recovery points, oldest first. With --store: from an applier's store."""
    if store is not None or find_sign_in() is None:
        # It brings numpy along, which nobody who asks the config server should wait for.
        from appliance.cli.store_points import list_store_points  # noqa: PLC0415

        list_store_points(store, machine, as_json=as_json)
        return
    with connect() as api:
        found = api.items(f"/machines/{part(machine)}/points")
        space_bytes = api.get(f"/machines/{part(machine)}")["space_bytes"]
    if as_json:
        print_json(found)  # the newest first, as the API has them
        return
    print_rows(
        [_row(point) for point in reversed(found)],
        (
            Column("point", "name"),
            Column("age", "age_seconds", span, right=True),
            Column("consistency", "consistency"),
            Column("changed", "changed_bytes", mebibytes, right=True),
            Column("verified", "verified_ns", instant),
            Column("kept", "kept"),
            Column("note", "reason", wraps=True),
        ),
        as_json=False,
        none=f"{machine} has no recovery point yet.",
    )
    if found:
        # A point takes what it changed until it is merged with others.
        print_line(
            f"{counted(len(found), 'point')}, {size(space_bytes)} at the applier", style="dim"
        )


@app.command()
def lock(
    machine: MachineName,
    point: Annotated[str, typer.Argument(metavar="POINT", help="Its name, as `points` lists it.")],
    *,
    until: Annotated[
        str,
        typer.Option(
            metavar="TIME", help="As 2027-01-31, 2027-01-31T12:00Z, or a span from now as 30d."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """See that a point cannot be deleted before a date. It can be made later, never sooner."""
    until_ns = parse_moment(until, time.time_ns())
    with connect() as api:
        found = api.post(
            f"/machines/{part(machine)}/points/{part(point)}/lock", {"until_ns": until_ns}
        )
    if as_json:
        print_json(found)
    else:
        print_line(f"{machine} {point}: cannot be deleted before {instant(until_ns)}.")


def parse_moment(text: str, now_ns: int) -> int:
    """Nanoseconds since 1970 of a date, a time (UTC unless it says otherwise), or a span from now.

    Raises ConfigError for anything else, and for what is over.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        seconds = parse_duration(text, "--until")
        until_ns = now_ns + seconds * 10**9
    else:
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        until_ns = int(moment.timestamp()) * 10**9
    if until_ns <= now_ns:
        raise ConfigError(f"--until: {text!r:.40} is over", hint="name a time that is to come")
    return until_ns


def _row(point: dict[str, Any]) -> dict[str, Any]:
    locked_ns = point.get("locked_until_ns") or 0
    kept = [f"until {instant(locked_ns)}"] if locked_ns > time.time_ns() else []
    kept += ["in use"] if point.get("held") else []
    return {
        **point,
        "age_seconds": (time.time_ns() - point["time_ns"]) / 1e9,
        "kept": ", ".join(kept),
    }

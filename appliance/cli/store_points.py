"""The recovery points of a machine in an applier's store, on its own host."""

import time
from typing import Any

import typer

from appliance.applier.store import Point
from appliance.applier.store.holds import Mark, marks_of, read_holds
from appliance.applier.store.point_names import point_name
from appliance.applier.store.reader_store import recovery_points
from appliance.cli.output import Column, instant, mebibytes, print_rows, seconds_ago
from appliance.cli.store_choice import find_machine, store_instead
from replication.errors import IntegrityError


def list_store_points(store: str | None, machine: str, *, as_json: bool) -> None:
    """List a machine's recovery points, oldest first."""
    reader = find_machine(store_instead(store), machine)
    chain = reader.chain()
    try:
        holds = read_holds(reader.folder)
    except IntegrityError as error:  # the points are needed all the more
        typer.echo(f"which of them are held cannot be told: {error}", err=True)
        holds = ()
    found = recovery_points(chain)
    marks = marks_of(found, holds, time.time_ns())
    print_rows(
        [_row(point, marks.get(point.position, Mark())) for point in found],
        (
            Column("point", "point"),
            Column("age", "age_seconds", seconds_ago, right=True),
            Column("consistency", "consistency"),
            Column("changed", "changed_bytes", mebibytes, right=True),
            Column("changeset", "changeset", right=True),
            Column("verified", "verified_ns", instant),
            Column("kept", "kept"),
            Column("note", "reason", wraps=True),
        ),
        as_json=as_json,
        none=f"{machine} has no recovery point yet.",
    )


def _row(point: Point, mark: Mark) -> dict[str, Any]:
    bookmark = point.bookmark
    kept = [f"until {instant(mark.locked_until_ns)}"] if mark.locked_until_ns else []
    kept += ["in use"] if mark.held else []
    return {
        "point": point_name(point),
        "position": point.position,
        "time_ns": bookmark.time_ns,
        "age_seconds": (time.time_ns() - bookmark.time_ns) / 1e9,
        "consistency": bookmark.consistency.value,
        "reason": bookmark.reason,
        "changed_bytes": point.changed_bytes,
        "changeset": str(bookmark.stamp),
        "verified_ns": point.verified_ns,
        "held": mark.held,
        "locked_until_ns": mark.locked_until_ns or None,
        "kept": ", ".join(kept),
        "disks": [
            {"disk": disk.index, "name": disk.name, "size_bytes": disk.size_bytes}
            for disk in point.disks
        ],
    }

"""``understudy points``: the recovery points of a machine."""

import time
from typing import Any

from appliance.applier.store import Point
from appliance.applier.store.point_names import point_name
from appliance.cli.output import AsJson, Column, instant, mebibytes, print_rows, seconds_ago
from appliance.cli.store_choice import Machine, Store, find_machine


def points(machine: Machine, *, store: Store = None, as_json: AsJson = False) -> None:
    """List a machine's recovery points, oldest first."""
    reader = find_machine(store, machine)
    print_rows(
        [_row(point) for point in reader.points()],
        (
            Column("point", "point"),
            Column("age", "age_seconds", seconds_ago, right=True),
            Column("consistency", "consistency"),
            Column("changed", "changed_bytes", mebibytes, right=True),
            Column("changeset", "changeset", right=True),
            Column("verified", "verified_ns", instant),
            Column("note", "reason", wraps=True),
        ),
        as_json=as_json,
        none=f"{machine} has no recovery point yet.",
    )


def _row(point: Point) -> dict[str, Any]:
    bookmark = point.bookmark
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
        "disks": [
            {"disk": disk.index, "name": disk.name, "size_bytes": disk.size_bytes}
            for disk in point.disks
        ],
    }

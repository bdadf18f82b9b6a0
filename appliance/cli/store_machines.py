"""The machines of an applier's store, for where there is no config server to ask."""

import time
from typing import Any

from appliance.applier.store import ReaderStore, machines_in, open_reader
from appliance.cli.output import Column, instant, print_rows, seconds_ago
from appliance.cli.store_choice import store_instead


def list_store(store: str | None, *, as_json: bool) -> None:
    """Print them, and how fresh their newest point is."""
    root = store_instead(store)
    rows = [_row(open_reader(root, machine)) for machine in machines_in(root)]
    print_rows(
        rows,
        (
            Column("machine", "name"),
            Column("disks", "disks", right=True),
            Column("points", "points", right=True),
            Column("newest point", "newest_ns", instant),
            Column("its age", "newest_age_seconds", seconds_ago, right=True),
            Column("damaged", "damaged_blocks", right=True),
            Column("id", "id"),
        ),
        as_json=as_json,
        none="The store holds no machine yet.",
    )


def _row(reader: ReaderStore) -> dict[str, Any]:
    points = reader.points()
    newest = points[-1] if points else None
    newest_ns = newest.bookmark.time_ns if newest else None
    return {
        "name": reader.name,
        "id": str(reader.machine),
        "disks": len(newest.disks) if newest else 0,
        "points": len(points),
        "newest_ns": newest_ns,
        "newest_age_seconds": (time.time_ns() - newest_ns) / 1e9 if newest_ns else None,
        "damaged_blocks": len(reader.damages()),
    }

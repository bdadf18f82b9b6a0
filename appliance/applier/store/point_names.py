"""How points and machines are called as folders, and what ``point.json`` says."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from typing import TYPE_CHECKING

from appliance.applier.store.layer_format import shapes_to_json
from appliance.applier.store.reader_store import ReaderStore, machines_in

if TYPE_CHECKING:
    from appliance.applier.store.model import Point

LATEST = "latest"


def point_name(point: Point) -> str:
    """For example ``2026-11-22T21:05:09Z-00000123``: source's time, position."""
    seconds = point.bookmark.time_ns // 1_000_000_000
    at = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return f"{at:%Y-%m-%dT%H:%M:%SZ}-{point.position:08d}"


def disk_name(disk: int) -> str:
    return f"disk{disk}.img"


def describe_point(store: ReaderStore, point: Point) -> bytes:
    """``point.json``."""
    bookmark = point.bookmark
    tree = {
        "machine": str(store.machine),
        "position": point.position,
        "stamp": str(bookmark.stamp),
        "time_ns": bookmark.time_ns,
        "consistency": bookmark.consistency.value,
        "reason": bookmark.reason,
        "applied_ns": point.applied_ns,
        "changed_bytes": point.changed_bytes,
        "disks": [
            {**shape, "file": disk_name(shape["index"])} for shape in shapes_to_json(point.disks)
        ],
    }
    return json.dumps(tree, indent=2).encode() + b"\n"


def machine_names(root: str) -> dict[str, ReaderStore]:
    """Folder name of each machine: its own name where that is unique, a file name and no id."""
    stores = [ReaderStore(root, machine) for machine in machines_in(root)]
    names = [store.name for store in stores]
    found = {}
    for store, name in zip(stores, names, strict=True):
        usable = 0 < len(name.encode()) <= 255 and "/" not in name and not name.startswith(".")
        unique = usable and names.count(name) == 1 and not _is_id(name)
        found[name if unique else str(store.machine)] = store
    return found


def _is_id(name: str) -> bool:
    try:
        return bool(uuid.UUID(name))
    except ValueError:
        return False

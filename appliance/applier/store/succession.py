"""What may follow what: stamps in order, disks that grow, shrink, come and go. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from appliance.applier.store.extents import DISK_INDEX_MAX, ZERO, Extents
from appliance.applier.store.layer_format import ATTEMPT_BYTES
from replication.block_set import BLOCK_BYTES, BLOCK_COUNT_MAX, block_count_of
from replication.bookmark import Stamp
from replication.errors import OutOfOrderError, PeerError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Sequence

    from appliance.applier.store.model import Point
    from replication.bookmark import Bookmark, DiskShape

SECTOR_BYTES = 512
GENERATION_MAX = (1 << 63) - 1


def check_follows(
    machine: uuid.UUID, head: Point | None, bookmark: Bookmark, since: int, attempt: bytes
) -> Stamp:
    """The head's stamp when a changeset follows it; OutOfOrderError when it does not.

    ``since`` is the number of the changeset whose state the changes start from.
    """
    stamp = bookmark.stamp
    before = head.bookmark.stamp if head else Stamp(0, 0)
    if len(attempt) != ATTEMPT_BYTES:
        raise PeerError(f"an attempt of {len(attempt)} bytes, not {ATTEMPT_BYTES}")
    if not 0 < stamp.generation <= GENERATION_MAX or not 0 < stamp.number <= GENERATION_MAX:
        raise PeerError(f"changeset {stamp} of machine {machine} has no valid stamp")
    if head and stamp == before and attempt == head.attempt:
        raise OutOfOrderError(f"changeset {stamp} of machine {machine} is applied already")
    if stamp.generation == before.generation:
        if since <= before.number < stamp.number:
            return before
        expected = f"one after {before} that starts from {before.number} or earlier"
    elif stamp.generation > before.generation:
        if since == 0:
            return before
        expected = f"one of generation {stamp.generation} that starts from 0"
    else:
        expected = f"one after {before}: its generation is over"
    raise OutOfOrderError(
        f"changeset {stamp} since {since} of machine {machine} does not follow {before}:"
        f" expected {expected}"
    )


def check_shapes(disks: Sequence[DiskShape]) -> None:
    """Raises PeerError when no machine can have these disks."""
    if len({disk.index for disk in disks}) != len(disks):
        raise PeerError("a changeset declares a disk twice")
    for disk in disks:
        if not 0 <= disk.index <= DISK_INDEX_MAX:
            raise PeerError(f"disk {disk.index} is outside 0 to {DISK_INDEX_MAX}")
        if disk.size_bytes % SECTOR_BYTES or not (
            0 <= disk.size_bytes <= BLOCK_COUNT_MAX * BLOCK_BYTES
        ):
            raise PeerError(f"disk {disk.index} cannot have {disk.size_bytes} bytes")


def zeros_of_lost_blocks(before: Point | None, disks: Sequence[DiskShape]) -> Extents:
    """Zero runs for what a disk loses by shrinking or by going.

    Without them old blocks would show again when it grows or comes back.
    """
    now = {disk.index: block_count_of(disk.size_bytes) for disk in disks}
    rows = []
    for disk in before.disks if before else ():
        had, has = block_count_of(disk.size_bytes), now.get(disk.index, 0)
        if has < had:
            rows.append((disk.index, has, had - has, ZERO))
    return Extents.of(rows)

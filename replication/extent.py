"""Runs of blocks as frames carry them.

Source: FORMAT.md §4.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from replication.block_set import BLOCK_BYTES, BLOCK_COUNT_MAX
from replication.errors import PeerError

_EXTENT = struct.Struct("<QII")
EXTENT_BYTES = _EXTENT.size
assert EXTENT_BYTES == 16

_DATA, _ZERO = 0, 1
COUNT_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Extent:
    """``count`` blocks from ``block``: with data, or zero (no payload; a hole again at the end)."""

    block: int
    count: int
    zero: bool = False

    @property
    def end(self) -> int:
        """The first block behind the extent."""
        return self.block + self.count

    @property
    def data_bytes(self) -> int:
        """Payload of the extent in its frame."""
        return 0 if self.zero else self.count * BLOCK_BYTES


def pack_extents(extents: Sequence[Extent]) -> bytes:
    return b"".join(
        _EXTENT.pack(extent.block, extent.count, _ZERO if extent.zero else _DATA)
        for extent in extents
    )


def unpack_extents(table: bytes | memoryview) -> tuple[Extent, ...]:
    """Read a table; raise PeerError unless extents ascend, do not overlap and are not empty."""
    if len(table) % EXTENT_BYTES:
        raise PeerError(f"an extent table of {len(table)} bytes is cut off")
    extents = []
    end = 0
    for block, count, kind in _EXTENT.iter_unpack(table):
        if kind not in (_DATA, _ZERO):
            raise PeerError(f"an extent at block {block} has the unknown kind {kind}")
        if count == 0 or block < end or block + count > BLOCK_COUNT_MAX:
            raise PeerError(f"an extent of {count} blocks at {block} is empty, astray or overlaps")
        extents.append(Extent(block, count, kind == _ZERO))
        end = block + count
    return tuple(extents)

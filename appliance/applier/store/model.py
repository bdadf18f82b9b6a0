"""What the store tells its callers: heads, points, damage.

Source: docs/STORE.md §1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from replication.errors import IntegrityError

if TYPE_CHECKING:
    import uuid

    from replication.bookmark import Bookmark, DiskShape, Stamp


@dataclass(frozen=True, slots=True)
class Head:
    """The newest position of a machine.

    attempt:    salt of the attempt that it was applied from.
    applied_ns: when it was applied, nanoseconds since 1970 UTC.
    """

    position: int
    stamp: Stamp
    attempt: bytes
    applied_ns: int


@dataclass(frozen=True, slots=True)
class Point:
    """A position that can be viewed; a recovery point where its bookmark is restorable.

    changed_bytes: what the layer that ends here holds, zero runs included; 0 for the base.
    verified_ns:   when all of it was last read and found right; None when never.
    """

    position: int
    bookmark: Bookmark
    attempt: bytes
    applied_ns: int
    changed_bytes: int
    verified_ns: int | None
    disks: tuple[DiskShape, ...]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer of the chain: the file and the positions that it covers."""

    first: int
    last: int
    file: str
    size_bytes: int
    extent_count: int


@dataclass(frozen=True, slots=True)
class Damage:
    """A place at which bytes are not what their digest says.

    disk, block: whose content it is; block is -1 where a whole file is unusable.
    file:        relative to the machine's folder.
    offset:      bytes into the file.
    expected:    the digest that the block should have; empty where a whole file is unusable.
    """

    disk: int
    block: int
    file: str
    offset: int
    expected: bytes
    found_ns: int


class RottenBlockError(IntegrityError):
    """A block is not what its digest says; it is refused and never served."""

    def __init__(self, machine: uuid.UUID, damage: Damage) -> None:
        super().__init__(
            f"block {damage.block} of disk {damage.disk} of machine {machine} does not have its"
            f" digest {damage.expected.hex()}: {damage.file} at byte {damage.offset}",
            hint="the disk under the store has lost or changed bytes; a resync brings fresh ones",
        )
        self.damage = damage

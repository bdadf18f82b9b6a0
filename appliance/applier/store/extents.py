"""Extents: runs of blocks of several disks, with data or zero, as parallel arrays.

A *key* joins disk and block in one integer (``disk << 40 | block``), so that one sorted array
holds all disks of a machine and one binary search finds a block. Extents of one set are sorted and
never overlap; only ``resolve`` takes what does. All of it is vectorised: cost grows with the
number of extents, never with the blocks that they cover.

Source: docs/STORE.md §3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from replication.block_set import BLOCK_COUNT_MAX

if TYPE_CHECKING:
    import numpy.typing as npt

    Ints = npt.NDArray[np.int64]

KEY_SHIFT = 40
DISK_INDEX_MAX = (1 << 16) - 1
ZERO = -1
"""In place of a data block: the run is zeros and has no data."""

assert BLOCK_COUNT_MAX < 1 << KEY_SHIFT


def key_of(disk: int, block: int) -> int:
    return disk << KEY_SHIFT | block


@dataclass(frozen=True, slots=True)
class Extents:
    """A set of extents.

    start: key of the first block; sorted.
    count: blocks.
    data:  number of the first data block, consecutive over the run; ZERO for zeros.
    """

    start: Ints
    count: Ints
    data: Ints

    @classmethod
    def empty(cls) -> Extents:
        none = np.zeros(0, np.int64)
        return cls(none, none, none)

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int]]) -> Extents:
        """From ``(disk, block, count, data)`` rows, in any order; they must not overlap."""
        if not rows:
            return cls.empty()
        table = np.array([(key_of(row[0], row[1]), row[2], row[3]) for row in rows], np.int64)
        table = table[np.argsort(table[:, 0], kind="stable")]
        return cls(table[:, 0].copy(), table[:, 1].copy(), table[:, 2].copy())

    def __len__(self) -> int:
        return len(self.start)

    @property
    def end(self) -> Ints:
        return self.start + self.count

    @property
    def disk(self) -> Ints:
        return self.start >> KEY_SHIFT

    @property
    def block(self) -> Ints:
        return self.start & ((1 << KEY_SHIFT) - 1)

    @property
    def block_count(self) -> int:
        """Blocks covered, zeros included."""
        return int(self.count.sum())

    def take(self, chosen: npt.NDArray[np.bool_] | Ints | slice) -> Extents:
        return Extents(self.start[chosen], self.count[chosen], self.data[chosen])

    def of_disk(self, disk: int) -> Extents:
        """Those of one disk."""
        low, high = np.searchsorted(self.start, [key_of(disk, 0), key_of(disk + 1, 0)])
        return self.take(slice(int(low), int(high)))

    def with_data(self) -> Extents:
        return self.take(self.data != ZERO)

    def zeros(self) -> Extents:
        return self.take(self.data == ZERO)

    def shifted(self, by: int) -> Extents:
        """The same with ``by`` added to every data block number."""
        return Extents(self.start, self.count, np.where(self.data == ZERO, ZERO, self.data + by))

    def is_well_formed(self) -> bool:
        """Sorted, without overlap, no empty run, keys and data in bounds."""
        if len(self) == 0:
            return True
        return bool(
            (self.start >= 0).all()
            and (self.count > 0).all()
            and (self.count <= BLOCK_COUNT_MAX).all()
            and (self.data >= ZERO).all()
            and (self.block + self.count <= BLOCK_COUNT_MAX).all()
            and (self.start[1:] >= self.end[:-1]).all()
        )


def joined(extents: Extents) -> Extents:
    """The same blocks in as few extents as possible."""
    if len(extents) < 2:
        return extents
    start, count, data = extents.start, extents.count, extents.data
    touching = start[1:] == start[:-1] + count[:-1]
    both_zero = (data[1:] == ZERO) & (data[:-1] == ZERO)
    one_run = (data[:-1] != ZERO) & (data[1:] == data[:-1] + count[:-1])
    firsts = np.concatenate(([0], np.flatnonzero(~(touching & (both_zero | one_run))) + 1))
    return Extents(start[firsts], np.add.reduceat(count, firsts), data[firsts])


def subtract(lower: Extents, upper: Extents) -> Extents:
    """The parts of ``lower`` that ``upper`` does not cover."""
    if len(lower) == 0 or len(upper) == 0:
        return lower
    lower_end, upper_end = lower.end, upper.end
    first = np.searchsorted(upper_end, lower.start, "right")
    cuts = np.searchsorted(upper.start, lower_end, "left") - first
    # A run with k runs above it leaves k + 1 pieces, some of them empty.
    owner = np.repeat(np.arange(len(lower)), cuts + 1)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(cuts + 1) - (cuts + 1), cuts + 1)
    above = first[owner] + nth
    last = nth == cuts[owner]
    before = upper_end[np.maximum(above - 1, 0)]
    after = upper.start[np.minimum(above, len(upper) - 1)]
    start = np.where(nth == 0, lower.start[owner], before)
    count = np.where(last, lower_end[owner], after) - start
    data = lower.data[owner]
    data = np.where(data == ZERO, ZERO, data + start - lower.start[owner])
    return Extents(start, count, data).take(count > 0)


def overlay(lower: Extents, upper: Extents) -> Extents:
    """Both, ``upper`` winning where they overlap."""
    rest = subtract(lower, upper)
    start = np.concatenate((rest.start, upper.start))
    by_start = np.argsort(start, kind="stable")
    return joined(
        Extents(
            start[by_start],
            np.concatenate((rest.count, upper.count))[by_start],
            np.concatenate((rest.data, upper.data))[by_start],
        )
    )


def overlay_all(sets: list[Extents]) -> Extents:
    """Every set over the one before it, in a tournament: n log n for many small ones."""
    while len(sets) > 1:
        pairs = [overlay(*sets[at : at + 2]) for at in range(0, len(sets) - 1, 2)]
        sets = pairs + sets[len(sets) & ~1 :]
    return sets[0] if sets else Extents.empty()


def resolve(start: Ints, count: Ints, data: Ints, order: Ints) -> Extents:
    """Extents of runs that may overlap: where they do, the greatest ``order`` wins.

    Of runs with the same order the later one in the arrays wins.
    """
    by_order = np.argsort(order, kind="stable")
    return _resolve(Extents(start[by_order], count[by_order], data[by_order]))


def _resolve(runs: Extents) -> Extents:
    by_start = np.argsort(runs.start, kind="stable")
    placed = runs.take(by_start)
    if (placed.start[1:] >= placed.end[:-1]).all():
        return joined(placed)
    half = len(runs) // 2
    return overlay(_resolve(runs.take(slice(half))), _resolve(runs.take(slice(half, None))))

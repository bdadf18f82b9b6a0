"""Base and layers of one disk flattened into one map: where each block lives.

Eight bytes a block; a map of a large disk lies in an unlinked file, so that it costs disk cache
rather than memory, where the disk has room for it. What nothing lies under is not written to: of a
disk with little on it, little of the map takes room.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from appliance.applier.store.base_image import allocate
from appliance.applier.store.extents import ZERO
from replication.checksum import DIGEST_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from appliance.applier.store.extents import Extents
    from appliance.applier.store.layer_reader import Layer

IN_BASE = 0
IS_ZERO = 1
FIRST_DATA = 2
"""Map values from here on are data blocks of the layers, numbered through all of them."""

LAYER_BASE = -1
LAYER_ZERO = -2

ANONYMOUS_BYTES_MAX = 256 << 20
"""The map of a disk of 128 GiB; only what layers touch takes memory."""

EXPAND_BLOCKS_MAX = 1 << 18
WINDOW_BLOCKS = 1 << 16
"""It is remembered of each 256 MiB whether there is anything that zeros could hide."""

_LONG_EXTENT_BLOCKS = 256


class BlockMap:
    """Where the blocks of one disk live at one position.

    sources: per block IN_BASE, IS_ZERO, or FIRST_DATA + number of a data block.
    digests: per data block two 64-bit words as they lie in the layers.
    starts:  number of each layer's first data block, and the total at the end.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        disk: int,
        block_count: int,
        scratch_folder: str,
        *,
        has_base: bool,
    ) -> None:
        per_layer = [layer.extents().of_disk(disk) for layer in layers]
        used = [len(extents.with_data()) > 0 for extents in per_layer]
        counts = [
            layer.header.data_blocks if is_used else 0
            for layer, is_used in zip(layers, used, strict=True)
        ]
        self.starts = np.concatenate(([0], np.cumsum(np.array(counts, np.int64))))
        total = int(self.starts[-1])
        digests = _memory(total * DIGEST_BYTES, scratch_folder)
        self.digests: npt.NDArray[np.uint64] = digests.view(np.uint64).reshape(total, 2)
        self.sources: npt.NDArray[np.int64] = _memory(block_count * 8, scratch_folder).view(
            np.int64
        )
        self._covers = np.full(-(-block_count // WINDOW_BLOCKS), has_base)
        raw = digests.data
        for layer, extents, first, count in zip(
            layers, per_layer, self.starts.tolist(), counts, strict=False
        ):
            if count:
                layer.digests(raw[first * DIGEST_BYTES : (first + count) * DIGEST_BYTES])
            self._paint(extents, first)

    def _paint(self, extents: Extents, first: int) -> None:
        sources = self.sources
        values = np.where(extents.data == ZERO, IS_ZERO, extents.data + first + FIRST_DATA)
        blocks = extents.block
        counts = np.minimum(extents.count, np.maximum(0, len(sources) - blocks))
        long = (counts > _LONG_EXTENT_BLOCKS) | (values == IS_ZERO)
        for block, count, value in zip(
            blocks[long].tolist(), counts[long].tolist(), values[long].tolist(), strict=True
        ):
            if value == IS_ZERO:
                self._paint_zeros(block, block + count)
            else:
                sources[block : block + count] = np.arange(value, value + count)
        is_data = (values != IS_ZERO) & (counts > 0)
        self._cover(blocks[is_data], counts[is_data])
        blocks, counts, values = blocks[~long], counts[~long], values[~long]
        at_once = max(1, EXPAND_BLOCKS_MAX // _LONG_EXTENT_BLOCKS)
        if len(counts) and int(counts.max()) == 1:
            at_once = EXPAND_BLOCKS_MAX
        for at in range(0, len(blocks), at_once):
            part = slice(at, at + at_once)
            repeat = counts[part]
            nth = np.arange(int(repeat.sum())) - np.repeat(np.cumsum(repeat) - repeat, repeat)
            sources[np.repeat(blocks[part], repeat) + nth] = np.repeat(values[part], repeat) + nth

    def _cover(self, blocks: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        """Remember in which windows these extents have something."""
        windows = len(self._covers) + 1
        begin = np.bincount(blocks // WINDOW_BLOCKS, minlength=windows)
        end = np.bincount(-(-(blocks + counts) // WINDOW_BLOCKS), minlength=windows)
        self._covers |= np.cumsum(begin - end)[:-1] > 0

    def _paint_zeros(self, block: int, end: int) -> None:
        """Where neither base nor layer has anything, a block reads as zeros already."""
        if end <= block:
            return
        first = block // WINDOW_BLOCKS
        covers = self._covers[first : -(-end // WINDOW_BLOCKS)]
        edges = np.flatnonzero(np.diff(covers.view(np.int8), prepend=0, append=0)) + first
        for begins, ends in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
            place = slice(max(block, begins * WINDOW_BLOCKS), min(end, ends * WINDOW_BLOCKS))
            self.sources[place] = IS_ZERO

    def layer_of(self, source: int) -> tuple[int, int]:
        """Which layer holds ``source``, and its data block number there."""
        number = source - FIRST_DATA
        layer = int(np.searchsorted(self.starts, number, "right")) - 1
        return layer, number - int(self.starts[layer])

    def runs(self, block: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """``(first, end, layer, data block)`` of runs that lie together, in order.

        first and end count from ``block``; layer is LAYER_BASE or LAYER_ZERO for what no layer
        holds, and the data block then means nothing.
        """
        sources = self.sources[block : block + count]
        step = np.diff(sources)
        is_data = sources >= FIRST_DATA
        layer = np.searchsorted(self.starts, sources - FIRST_DATA, "right") - 1
        together = (is_data[:-1] & (step == 1) & (layer[1:] == layer[:-1])) | (
            ~is_data[:-1] & (step == 0)
        )
        firsts = np.concatenate(([0], np.flatnonzero(~together) + 1))
        layers = np.where(is_data, layer, np.where(sources == IN_BASE, LAYER_BASE, LAYER_ZERO))
        numbers = sources - FIRST_DATA - self.starts[layer]
        return zip(
            firsts.tolist(),
            [*firsts[1:].tolist(), count],
            layers[firsts].tolist(),
            numbers[firsts].tolist(),
            strict=True,
        )


def _memory(size_bytes: int, scratch_folder: str) -> npt.NDArray[np.uint8]:
    """Zeroed memory; in a nameless file when it is much and the disk has room for all of it.

    A sparse file would end the process (SIGBUS) at the page for which there is no room.
    """
    if size_bytes > ANONYMOUS_BYTES_MAX:
        with contextlib.suppress(OSError):
            fd = os.open(scratch_folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size_bytes)
                allocate(fd, size_bytes)
                return np.frombuffer(mmap.mmap(fd, size_bytes), np.uint8)
            finally:
                os.close(fd)
    return np.zeros(size_bytes, np.uint8)

"""From runs of blocks to sealed frames, in order, and from frames to segments.

Blocks are read in pieces of up to one frame; runs of zeros become zero extents. Frame numbers are
taken in the order of reading, so of two frames with the same block the one that was read later
wins. Sealing (zstd, AES) runs in a few threads; at most SEALING_COUNT_MAX frames wait for it.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import xxhash

from replication.block_set import BLOCK_BYTES
from replication.envelope import AttemptSealer
from replication.extent import COUNT_MAX, Extent
from replication.frame import EXTENT_COUNT_MAX, FRAME_BYTES_MAX, PLAIN_BYTES_MAX
from replication.manifest import SegmentEntry

SEALING_COUNT_MAX = 4
FRAME_BLOCKS = PLAIN_BYTES_MAX // BLOCK_BYTES

ReadBlocks = Callable[[int, int], bytes | bytearray | memoryview]
"""(first block, count) -> the blocks' data, the last one padded."""


@dataclass(slots=True)
class FrameContent:
    """What one frame is going to carry."""

    disk: int
    extents: list[Extent] = field(default_factory=list)
    pieces: list[bytes | memoryview] = field(default_factory=list)
    data_bytes: int = 0

    def room_for(self, data_bytes: int) -> bool:
        return (
            self.data_bytes + data_bytes <= PLAIN_BYTES_MAX and len(self.extents) < EXTENT_COUNT_MAX
        )

    def add(self, extent: Extent, data: bytes | memoryview = b"") -> None:
        """Append an extent behind the others; a neighbour of the same kind is grown instead."""
        last = self.extents[-1] if self.extents else None
        if (
            last
            and (last.end, last.zero) == (extent.block, extent.zero)
            and last.count + extent.count <= COUNT_MAX
        ):
            self.extents[-1] = Extent(last.block, last.count + extent.count, last.zero)
        else:
            self.extents.append(extent)
        if not extent.zero:
            self.pieces.append(data)
            self.data_bytes += len(data)


def zero_blocks(
    data: bytes | bytearray | memoryview,
) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
    """For each whole block of ``data`` whether it is all zeros."""
    words = np.frombuffer(data, np.uint64).reshape(-1, BLOCK_BYTES // 8)
    zero: np.ndarray[tuple[int], np.dtype[np.bool_]] = words.max(axis=1) == 0
    return zero


def contents(
    disk: int, runs: Iterable[tuple[int, int]], read: ReadBlocks
) -> Iterator[FrameContent]:
    """Read ``runs`` (ascending) and cut them into frames."""
    frame = FrameContent(disk)
    for first, run_count in runs:
        block, left = first, run_count
        while left:
            count = min(left, FRAME_BLOCKS)
            data = memoryview(read(block, count))
            for extent, piece in _split(block, data):
                if not frame.room_for(len(piece)):
                    yield frame
                    frame = FrameContent(disk)
                frame.add(extent, piece)
            block += count
            left -= count
    if frame.extents:
        yield frame


def zero_contents(disk: int, runs: Iterable[tuple[int, int]]) -> Iterator[FrameContent]:
    """Frames for runs that are known to be holes: nothing is read."""
    frame = FrameContent(disk)
    for first, run_count in runs:
        block, left = first, run_count
        while left:
            count = min(left, COUNT_MAX)
            if not frame.room_for(0):
                yield frame
                frame = FrameContent(disk)
            frame.add(Extent(block, count, zero=True))
            block += count
            left -= count
    if frame.extents:
        yield frame


def _split(block: int, data: memoryview) -> Iterator[tuple[Extent, memoryview | bytes]]:
    """Cut what was read into runs of data and runs of zeros."""
    zero = zero_blocks(data)
    if not zero.any():
        yield Extent(block, len(zero)), data
        return
    edges = [0, *(np.flatnonzero(np.diff(zero)) + 1).tolist(), len(zero)]
    for start, end in pairwise(edges):
        is_zero = bool(zero[start])
        piece: memoryview | bytes = (
            b"" if is_zero else data[start * BLOCK_BYTES : end * BLOCK_BYTES]
        )
        yield Extent(block + start, end - start, is_zero), piece


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment ready to go: its index in the changeset, its entry for the manifest, its bytes."""

    index: int
    entry: SegmentEntry
    data: bytes


class SegmentBuilder:
    """Seals frames and cuts them into segments; used by one thread, which ``submit`` may block.

    After the last frame call ``finish``; ``entries`` is then what the manifest lists.
    """

    def __init__(
        self,
        sealer: AttemptSealer,
        executor: Executor,
        submit: Callable[[Segment], None],
        *,
        segment_bytes: int,
    ) -> None:
        self._sealer = sealer
        self._executor = executor
        self._submit = submit
        self._segment_bytes = segment_bytes
        self._sealing: deque[Future[bytes]] = deque()
        self._segment = self._empty_segment()
        self._frame_count = 0
        self.entries: list[SegmentEntry] = []
        self.changed_blocks = 0

    @property
    def sent_bytes(self) -> int:
        """What was handed to ``submit``."""
        return sum(entry.size_bytes for entry in self.entries)

    def add(self, content: FrameContent) -> None:
        number = self._sealer.next_number()
        self.changed_blocks += sum(extent.count for extent in content.extents)
        self._sealing.append(self._executor.submit(self._seal, number, content))
        while len(self._sealing) >= SEALING_COUNT_MAX:
            self._take()

    def finish(self) -> None:
        while self._sealing:
            self._take()
        if self._frame_count:
            self._cut()

    def _seal(self, number: int, content: FrameContent) -> bytes:
        data = content.pieces[0] if len(content.pieces) == 1 else b"".join(content.pieces)
        return self._sealer.seal_frame(number, content.disk, content.extents, data)

    def _take(self) -> None:
        self._segment.write(self._sealing.popleft().result())
        self._frame_count += 1
        if self._segment.tell() >= self._segment_bytes:
            self._cut()

    def _cut(self) -> None:
        self._segment.truncate()
        data = self._segment.getvalue()  # its own buffer, not a copy
        entry = SegmentEntry(self._frame_count, len(data), xxhash.xxh3_128_digest(data))
        segment = Segment(len(self.entries), entry, data)
        self._segment, self._frame_count = self._empty_segment(), 0
        self.entries.append(entry)
        self._submit(segment)

    def _empty_segment(self) -> io.BytesIO:
        """Room for a whole one at once: growing would move it, and hold it twice meanwhile."""
        return io.BytesIO(bytes(self._segment_bytes + FRAME_BYTES_MAX))

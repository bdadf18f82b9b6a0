"""Which chunks of the disks differ from the state at the second site: what a resync sends.

The trackers run all the while, and nothing takes their marks: a block that is written after it was
read here is marked, whatever was read. So each chunk is read once, as it is at that moment, by the
same way as for sending; holes are not read. The second site's state stands still meanwhile, since
nothing is sent.

Of a disk only the sums of one part are in memory, and its map of holes (32 KiB per GiB).
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import structlog

from agents.mobility.bookkeeping import note_compared
from agents.mobility.source import SourceDisk
from agents.mobility.stream_state import BlockSets, StreamStateFile
from replication.block_set import BLOCK_BYTES, BlockSet
from replication.bookmark import Stamp
from replication.checksum import (
    CHUNK_BLOCKS,
    DIGEST_BYTES,
    block_digests,
    chunk_digest,
)
from replication.errors import CaptureError, IntegrityError, PeerError
from replication.sums import (
    MIB_BYTES,
    MIB_CHUNKS,
    PART_SUMS,
    SumsPlace,
    mib_sums,
    open_sums,
)

STEP_MIBS = 16
"""Read and compared at once, before others get the processor."""

SAVE_SECONDS = 10.0
"""Between two times that what was found is made durable."""

READ_BLOCKS = 256
PAUSE_SECONDS_MAX = 5.0

FetchSums = Callable[[SumsPlace], Awaitable[bytes | None]]


@dataclass(slots=True)
class Progress:
    """How far the comparison is. ``tell`` is called at each step.

    began_bytes: where this pass began, for the rate.
    """

    total_bytes: int
    done_bytes: int = 0
    differing_bytes: int = 0
    began_bytes: int = 0
    began_at: float = field(default_factory=time.monotonic)
    tell: Callable[[], None] = lambda: None

    @property
    def bytes_per_second(self) -> float:
        return (self.done_bytes - self.began_bytes) / max(time.monotonic() - self.began_at, 1e-3)

    @property
    def seconds_left(self) -> float:
        """By the rate so far; 0 while that is not known."""
        rate = self.bytes_per_second
        return (self.total_bytes - self.done_bytes) / rate if rate else 0.0


class Comparison:
    """One pass over all disks against the sums of one basis.

    fetch:     a part as it lies in the cache; None while it is not there.
    share_max: how much of the time it may work.
    """

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        state: StreamStateFile,
        fetch: FetchSums,
        *,
        machine: uuid.UUID,
        data_key: bytes,
        share_max: float,
        stopping: asyncio.Event,
    ) -> None:
        self._disks = disks
        self._state = state
        self._fetch = fetch
        self._machine = machine
        self._data_key = data_key
        self._share_max = share_max
        self._stopping = stopping
        self._found: BlockSets = {disk.index: BlockSet(disk.block_count) for disk in disks}
        self._saved_at = time.monotonic()
        self.progress = Progress(sum(_span(disk) for disk in disks))

    async def run(self, stamp: Stamp, basis: bytes) -> None:
        """Compare everything that was not yet compared with ``basis``; all of it is noted then.

        Raises CaptureError when sums are missing or damaged: what was found so far is noted, and a
        later pass goes on from there. StorageError when a disk cannot be read.
        """
        resync = self._state.position.resync
        assert resync is not None
        same = self._state.position.basis == basis
        progress = self.progress
        progress.done_bytes = progress.began_bytes = resync.cursor if same else 0
        try:
            await self._run(stamp, basis)
        finally:
            await self._save(basis)
        structlog.get_logger().info(
            "the disks are compared",
            bytes=progress.total_bytes,
            differing_bytes=progress.differing_bytes,
            seconds=round(time.monotonic() - progress.began_at, 1),
        )

    async def _run(self, stamp: Stamp, basis: bytes) -> None:
        begin = 0
        for disk in self._disks:
            end = begin + _span(disk)
            if end > self.progress.done_bytes:
                place = SumsPlace(
                    self._machine, stamp, basis, disk.index, 1, 0, disk.shape.size_bytes
                )
                await _OneDisk(self, disk, place, begin).run()
            begin = end

    async def sums(self, place: SumsPlace) -> bytes:
        """One part of the sums."""
        data = await self._fetch(place)
        if data is None:
            raise CaptureError(
                f"the second site has not put part {place.part} of level {place.level} of the sums "
                f"of disk {place.disk}, or its cache has lost it: it puts them again"
            )
        try:
            return open_sums(self._data_key, place, data)
        except (IntegrityError, PeerError) as error:
            raise CaptureError(
                f"sums from the second site cannot be used: {error}",
                hint="the applier puts them again; if that does not help see its health, and that "
                "it has this machine's data key",
            ) from error

    async def step(self, work: Callable[[], bytes]) -> bytes:
        """Do a piece of work in a thread, and rest as long as politeness asks."""
        if self._stopping.is_set():
            raise CaptureError("the agent is stopping; the comparison goes on at its next start")
        began = time.monotonic()
        made = await asyncio.to_thread(work)
        worked = time.monotonic() - began
        await asyncio.sleep(min(worked * (1 / self._share_max - 1), PAUSE_SECONDS_MAX))
        return made

    def add(self, disk: SourceDisk, first_chunk: int, differing: Sequence[int]) -> None:
        """Chunks ``first_chunk + i`` differ."""
        for index in differing:
            block = (first_chunk + index) * CHUNK_BLOCKS
            count = min(CHUNK_BLOCKS, disk.block_count - block)
            self._found[disk.index].add_run(block, count)
            self.progress.differing_bytes += count * BLOCK_BYTES

    async def advance(self, done_bytes: int, basis: bytes) -> None:
        """All up to ``done_bytes`` is in what was found."""
        self.progress.done_bytes = done_bytes
        self.progress.tell()
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            await self._save(basis)

    async def _save(self, basis: bytes) -> None:
        await asyncio.to_thread(
            note_compared, self._state, basis, self._found, self.progress.done_bytes
        )
        self._saved_at = time.monotonic()


class _OneDisk:
    """One disk's part of a comparison; ``begin`` is where it begins among all."""

    def __init__(
        self, comparison: Comparison, disk: SourceDisk, place: SumsPlace, begin: int
    ) -> None:
        self._comparison = comparison
        self._disk = disk
        self._place = place
        self._begin = begin
        self._small: tuple[int, bytes] = (-1, b"")

    async def run(self) -> None:
        disk, comparison = self._disk, self._comparison
        # The tracker runs: a hole that is written from now on is marked.
        held = _held_chunks(await asyncio.to_thread(disk.allocated))
        mib_count = _span(disk) // MIB_BYTES
        at = max(0, comparison.progress.done_bytes - self._begin) // MIB_BYTES
        part, sums = -1, b""
        while at < mib_count:
            if at // PART_SUMS != part:
                part = at // PART_SUMS
                sums = await comparison.sums(_moved(self._place, 1, part))
            end = min(at + STEP_MIBS, mib_count, (part + 1) * PART_SUMS)
            first, last = at * MIB_CHUNKS, min(end * MIB_CHUNKS, len(held))
            digests = await comparison.step(
                lambda first=first, last=last: chunk_digests(disk, first, last, held)  # type: ignore[misc]
            )
            skip = at - part * PART_SUMS
            theirs = sums[skip * DIGEST_BYTES : (skip + end - at) * DIGEST_BYTES]
            for mib in _differing(mib_sums(digests), theirs):
                await self._look_closer(at + mib, digests[mib * MIB_CHUNKS * DIGEST_BYTES :])
            at = end
            await comparison.advance(self._begin + at * MIB_BYTES, self._place.basis)

    async def _look_closer(self, mib: int, digests: bytes) -> None:
        """A MiB differs: find out which of its chunks."""
        first = mib * MIB_CHUNKS
        part = first // PART_SUMS
        if self._small[0] != part:
            self._small = (
                part,
                await self._comparison.sums(_moved(self._place, 2, part)),
            )
        skip = (first - part * PART_SUMS) * DIGEST_BYTES
        theirs = self._small[1][skip : skip + MIB_CHUNKS * DIGEST_BYTES]
        self._comparison.add(self._disk, first, _differing(digests[: len(theirs)], theirs))


def chunk_digests(disk: SourceDisk, first: int, last: int, held: "npt.NDArray[np.bool_]") -> bytes:
    """Digests of the chunks ``first`` to ``last`` - 1; those that are not ``held`` are not read."""
    made = bytearray(b"".join(_zero_digest(disk, chunk) for chunk in range(first, last)))
    for start, end in _runs(held[first:last]):
        for at in range(first + start, first + end, READ_BLOCKS // CHUNK_BLOCKS):
            block = at * CHUNK_BLOCKS
            stop = min(at + READ_BLOCKS // CHUNK_BLOCKS, first + end) * CHUNK_BLOCKS
            data = disk.read_blocks(block, min(stop, disk.block_count) - block)
            digests = memoryview(block_digests(data))
            step = CHUNK_BLOCKS * DIGEST_BYTES
            for index, offset in enumerate(range(0, len(digests), step)):
                place = (at - first + index) * DIGEST_BYTES
                made[place : place + DIGEST_BYTES] = chunk_digest(digests[offset : offset + step])
    return bytes(made)


_ZERO_CHUNK = chunk_digest(bytes(CHUNK_BLOCKS * DIGEST_BYTES))


def _zero_digest(disk: SourceDisk, chunk: int) -> bytes:
    count = min(CHUNK_BLOCKS, disk.block_count - chunk * CHUNK_BLOCKS)
    return _ZERO_CHUNK if count == CHUNK_BLOCKS else chunk_digest(bytes(count * DIGEST_BYTES))


def _held_chunks(allocated: BlockSet) -> "npt.NDArray[np.bool_]":
    """For each chunk of the disk whether any of its blocks may hold data."""
    words = np.frombuffer(allocated.to_bitmap(), "<u2")
    held: npt.NDArray[np.bool_] = words[: -(-allocated.block_count // CHUNK_BLOCKS)] != 0
    return held


def _runs(chosen: "npt.NDArray[np.bool_]") -> Iterator[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(chosen.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _differing(ours: bytes, theirs: bytes) -> list[int]:
    """The indexes at which two lists of digests differ."""
    if len(ours) != len(theirs):
        raise IntegrityError(f"{len(theirs)} bytes of sums stand where {len(ours)} belong")
    if ours == theirs:
        return []
    rows = np.frombuffer(ours, np.uint64).reshape(-1, 2)
    others = np.frombuffer(theirs, np.uint64).reshape(-1, 2)
    found: list[int] = np.flatnonzero((rows != others).any(axis=1)).tolist()
    return found


def _span(disk: SourceDisk) -> int:
    """The bytes of a disk, up to a whole MiB."""
    return -(-disk.shape.size_bytes // MIB_BYTES) * MIB_BYTES


def _moved(place: SumsPlace, level: int, part: int) -> SumsPlace:
    return SumsPlace(
        place.machine, place.stamp, place.basis, place.disk, level, part, place.size_bytes
    )

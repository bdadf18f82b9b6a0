"""One changeset from the cache into a layer of the store.

Segments are fetched in parallel and opened by a few threads, each a whole segment; a frame's
number is its order in the layer, so segments may finish in any order. Nothing of a changeset is
in the store until ``seal`` returns, and all of it is then.

Source: FORMAT.md §4, §6, §7.
"""

import asyncio
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field

from appliance.applier.cache_account import CacheAccount
from appliance.applier.fetch import ByteWindow, fetch_segment, is_intact
from appliance.applier.store.layer_writer import LayerWriter
from replication.block_set import block_count_of
from replication.bookmark import DiskShape
from replication.cache_layout import segment_name
from replication.envelope import AttemptKey
from replication.errors import IntegrityError, PeerError, ReplicationError
from replication.frame import NEED_DATA, PLAIN_BYTES_MAX, FrameHeader, FrameReader
from replication.manifest import Manifest, SegmentEntry

FEED_BYTES = PLAIN_BYTES_MAX
"""A segment goes into the frame reader in pieces of this size, which bounds the reader's buffer."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A segment to bring.

    name:  of its blob.
    first: number of its first frame.
    """

    name: str
    entry: SegmentEntry
    first: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A changeset whose manifest is authentic.

    container: where its blobs are.
    """

    manifest: Manifest
    key: AttemptKey
    container: str

    def segments(self) -> Iterator[Wanted]:
        """In order."""
        manifest, first = self.manifest, 0
        for index, entry in enumerate(manifest.segments):
            name = segment_name(manifest.stamp.number, manifest.attempt, index)
            yield Wanted(name, entry, first)
            first += entry.frame_count


@dataclass(frozen=True, slots=True)
class Found:
    """What of a changeset's segments is in the cache.

    versions: of the blobs that are there with the right size.
    missing:  names of those that are not.
    """

    versions: Mapping[str, str]
    missing: tuple[str, ...]


@dataclass(slots=True)
class Faults:
    """Why a changeset cannot be sealed.

    missing:   names of segments that are not in the cache.
    damaged:   names of segments with what is wrong with them: fresh bytes can mend it.
    malformed: what the source sealed that the format does not allow: fresh bytes cannot.
    """

    missing: list[str] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    malformed: str = ""

    def __bool__(self) -> bool:
        return bool(self.missing or self.damaged or self.malformed)


async def find_segments(account: CacheAccount, opened: Opened) -> Found:
    """Look which segments are there, without reading any."""
    segments = list(opened.segments())
    if not segments:
        return Found({}, ())
    folder = segments[0].name[: segments[0].name.rindex("/") + 1]
    there = {blob.name: blob for blob in await account.blobs(opened.container, folder)}
    versions, missing = {}, []
    for name, entry in ((segment.name, segment.entry) for segment in segments):
        if name in there and there[name].size_bytes == entry.size_bytes:
            versions[name] = there[name].version
        else:
            missing.append(name)
    return Found(versions, tuple(missing))


class LayerFiller:
    """Writes the frames of a changeset into a layer; may be used by several threads."""

    def __init__(self, writer: LayerWriter, disks: tuple[DiskShape, ...]) -> None:
        self._writer = writer
        self._blocks = {disk.index: block_count_of(disk.size_bytes) for disk in disks}

    def take(self, header: FrameHeader, data: bytes) -> None:
        """Write one frame; PeerError when it does not lie on the machine's disks."""
        blocks = self._blocks.get(header.disk)
        if blocks is None or header.extents[-1].end > blocks:
            raise PeerError(
                f"frame {header.number} writes disk {header.disk} up to block"
                f" {header.extents[-1].end}, which the manifest does not have"
            )
        runs = [(extent.block, extent.count) for extent in header.extents if not extent.zero]
        if runs:
            self._writer.write_extents(header.disk, runs, header.number, data)
        for extent in header.extents:
            if extent.zero:
                self._writer.zero(header.disk, extent.block, extent.count, header.number)


async def fill_layer(
    account: CacheAccount,
    opened: Opened,
    filler: LayerFiller,
    window: ByteWindow,
    pool: Executor,
) -> Faults:
    """Fetch, check and open all segments into ``filler``.

    No faults: everything is in the layer, which may be sealed. After a first fault nothing more
    is opened, but the other segments are still checked, so that all that is missing or damaged
    is told at once. No thread of ``pool`` works for this call once it has returned.
    """
    faults = Faults()
    stop = threading.Event()
    started: list[Future[None]] = []

    async def bring(wanted: Wanted) -> None:
        name = wanted.name
        segment = await fetch_segment(account, opened.container, name, wanted.entry)
        if segment is None:
            stop.set()
            faults.missing.append(name)
            return
        future = pool.submit(open_segment, segment, wanted, opened.key, filler.take, stop)
        started.append(future)
        try:
            await asyncio.wrap_future(future)
        except IntegrityError as error:
            stop.set()
            faults.damaged[name] = str(error)
        except PeerError as error:
            stop.set()
            faults.malformed = f"{name}: {error}"

    try:
        async with asyncio.TaskGroup() as tasks:
            for wanted in opened.segments():
                size_bytes = wanted.entry.size_bytes
                await window.enter(size_bytes)
                task = tasks.create_task(bring(wanted), name=wanted.name)
                # Not in the task: one that is cancelled before it runs would never give it back.
                task.add_done_callback(functools.partial(_leave, window, size_bytes))
    except BaseExceptionGroup as failures:
        raise _first(failures) from None
    finally:
        # A cancelled wait leaves its thread at work in the layer: it ends within a frame.
        stop.set()
        for future in started:
            future.cancel()
        wait(started)
    return faults


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What is to be told of several failures: a defect before what may pass."""
    leaves = list(_leaves(failures))
    return next((leaf for leaf in leaves if not isinstance(leaf, ReplicationError)), leaves[0])


def _leaves(failures: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for failure in failures.exceptions:
        if isinstance(failure, BaseExceptionGroup):
            yield from _leaves(failure)
        else:
            yield failure


def _leave(window: ByteWindow, size_bytes: int, _: asyncio.Task[None]) -> None:
    window.leave(size_bytes)


def open_segment(
    segment: bytes,
    wanted: Wanted,
    key: AttemptKey,
    take: Callable[[FrameHeader, bytes], None],
    stop: threading.Event,
) -> None:
    """Check a segment and hand its frames on, until ``stop``.

    Raises IntegrityError when it is not what the manifest names, PeerError when its frames are not
    numbered as they must be.
    """
    entry = wanted.entry
    if not is_intact(segment, entry):
        raise IntegrityError(
            f"a segment of {len(segment)} bytes does not have the digest that the manifest declares"
        )
    reader = FrameReader()
    number = wanted.first
    view = memoryview(segment)
    for at in range(0, len(segment), FEED_BYTES):
        reader.receive_data(view[at : at + FEED_BYTES])
        while not stop.is_set() and (frame := reader.next_event()) is not NEED_DATA:
            if frame.header.number != number:
                raise PeerError(f"frame {frame.header.number} stands in the place of {number}")
            take(frame.header, key.open_frame(frame))
            number += 1
        if stop.is_set():
            return
    reader.close()
    if number != wanted.first + entry.frame_count:
        raise PeerError(
            f"{number - wanted.first} frames are there, the manifest says {entry.frame_count}"
        )

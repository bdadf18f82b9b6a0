"""From the spool into the cache storage account, a machine's changesets in order.

Segments of several changesets go side by side; a manifest is put when all its segments and all
manifests before it are acknowledged, so what exists in the cache is a prefix of the stream. What
the cache acknowledges it may yet forget: `watcher.py` looks after that.
"""

import asyncio
from collections import deque

import structlog

from appliance.process_server.cache_account import CacheAccount
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.measures import Measures
from appliance.process_server.persistence import Persistence
from appliance.process_server.segment_file import Segment
from appliance.process_server.stream import Changeset, Stream, held_in_order
from appliance.process_server.upload_budget import UploadBudget
from replication.cache_layout import container_name, manifest_name, segment_name
from replication.errors import IntegrityError, UnavailableError

CHANGESETS_AHEAD_MAX = 8
"""Of one machine, whose segments are on their way while the oldest's manifest is waited for."""

_log = structlog.get_logger()


class Uploader:
    """Puts changesets of any machine; one per process, so that the budget holds for all."""

    def __init__(
        self,
        cache: CacheAccount,
        disk: DiskThreads,
        budget: UploadBudget,
        persistence: Persistence,
        measures: Measures,
        *,
        recheck_seconds: float,
    ) -> None:
        self._cache = cache
        self._disk = disk
        self._budget = budget
        self._persistence = persistence
        self._measures = measures
        self._recheck_seconds = recheck_seconds

    async def run(self, stream: Stream) -> None:
        """Upload what ``stream`` commits, until cancelled.

        Raises IntegrityError when a segment in the spool is damaged.
        """
        await self.note_present(stream)
        async with asyncio.TaskGroup() as tasks:
            window: deque[tuple[Changeset, asyncio.Task[None]]] = deque()
            while True:
                stream.committed.clear()
                under_way = {changeset.stamp for changeset, _ in window}
                for changeset in held_in_order(stream):
                    if len(window) >= CHANGESETS_AHEAD_MAX:
                        break
                    if not changeset.whole and changeset.stamp not in under_way:
                        task = tasks.create_task(self.put_segments(stream, changeset))
                        window.append((changeset, task))
                if not window:
                    await stream.committed.wait()
                    continue
                changeset, task = window[0]
                if not task.done():
                    full = len(window) == CHANGESETS_AHEAD_MAX
                    await (asyncio.wait([task]) if full else _first_of(task, stream.committed))
                else:
                    await self.put_manifest(stream, changeset)
                    window.popleft()

    async def note_present(self, stream: Stream) -> None:
        """After a restart: what the cache holds of the stream need not be sent again."""
        sizes: dict[str, dict[str, int]] = {}
        for changeset in list(held_in_order(stream)):
            container = container_name(stream.machine, changeset.stamp)
            if container not in sizes:
                sizes[container] = await self._persistence.insist(
                    lambda container=container: self._cache.sizes(container)  # type: ignore[misc]
                )
            note_uploaded(changeset, sizes[container])
            if changeset.whole:
                self._note_durable(stream, changeset)

    async def put_segments(self, stream: Stream, changeset: Changeset) -> None:
        """Put the segments that are not known to be there."""
        async with asyncio.TaskGroup() as tasks:
            for segment in changeset.segments:
                if segment.index not in changeset.uploaded:
                    await self._budget.take(segment.size_bytes)
                    tasks.create_task(self._put_taken(stream, changeset, segment))

    async def put_segment(
        self, stream: Stream, changeset: Changeset, segment: Segment, *, over: bool = False
    ) -> None:
        """Put one segment, ``over`` what is there or only where nothing is."""
        async with self._budget.place(segment.size_bytes):
            await self._put(stream, changeset, segment, over=over)

    async def put_manifest(
        self, stream: Stream, changeset: Changeset, *, over: bool = False
    ) -> None:
        """Put the manifest, whose segments are all there, and wake an applier."""
        name = manifest_name(changeset.stamp.number)
        container = container_name(stream.machine, changeset.stamp)

        async def put() -> None:
            _refuse_pruned(stream, changeset)
            content = await self._disk.run(stream.spool.read_manifest, changeset.id)
            await self._cache.put(container, name, content, over=over)

        try:
            await self._persistence.insist(put)
        except FileNotFoundError:
            _refuse_lost(stream, changeset)
        else:
            self._measures.bytes_uploaded.inc(changeset.manifest_bytes)
            await self._wake(stream)
        changeset.whole = True
        changeset.recheck_seconds = changeset.recheck_seconds or self._recheck_seconds
        changeset.recheck_at = asyncio.get_running_loop().time() + changeset.recheck_seconds
        self._note_durable(stream, changeset)

    @staticmethod
    def _note_durable(stream: Stream, changeset: Changeset) -> None:
        """A changeset that was let go without being applied may never have come whole."""
        if not (stream.holds(changeset) or changeset.stamp <= stream.position.applied):
            return
        if all(one.whole for one in held_in_order(stream) if one.stamp < changeset.stamp):
            stream.durable_ns = max(stream.durable_ns, changeset.time_ns)

    async def _put_taken(self, stream: Stream, changeset: Changeset, segment: Segment) -> None:
        try:
            await self._put(stream, changeset, segment, over=False)
        finally:
            self._budget.give_back(segment.size_bytes)

    async def _put(
        self, stream: Stream, changeset: Changeset, segment: Segment, *, over: bool
    ) -> None:
        name = segment_name(changeset.stamp.number, changeset.id.attempt, segment.index)
        container = container_name(stream.machine, changeset.stamp)

        async def put() -> None:
            _refuse_pruned(stream, changeset)
            content = await self._disk.run(stream.spool.read_segment, changeset.id, segment)
            await self._cache.put(container, name, content, over=over)

        try:
            await self._persistence.insist(put)
        except FileNotFoundError:
            _refuse_lost(stream, changeset)
        else:
            self._measures.bytes_uploaded.inc(segment.size_bytes)
        changeset.uploaded.add(segment.index)

    async def _wake(self, stream: Stream) -> None:
        try:
            await self._cache.wake(stream.machine)
        except UnavailableError as error:
            # The applier's sweep finds the manifest all the same, some seconds later.
            _log.debug("wake-up lost", machine=str(stream.machine), reason=str(error))


def note_uploaded(changeset: Changeset, sizes: dict[str, int]) -> None:
    """Take from a container's listing what is there of ``changeset``."""
    number, attempt = changeset.stamp.number, changeset.id.attempt
    changeset.uploaded = {
        segment.index
        for segment in changeset.segments
        if sizes.get(segment_name(number, attempt, segment.index)) == segment.size_bytes
    }
    changeset.whole = (
        len(changeset.uploaded) == len(changeset.segments)
        and sizes.get(manifest_name(number)) == changeset.manifest_bytes
    )


def _refuse_pruned(stream: Stream, changeset: Changeset) -> None:
    """What is applied or let go of is not put: its container may be dropped by now, and would
    come back.
    """
    if not stream.holds(changeset):
        raise FileNotFoundError(str(changeset.id))


def _refuse_lost(stream: Stream, changeset: Changeset) -> None:
    """A file that is gone is fine if its changeset is dropped, also when another one has taken its
    stamp since; it is damage if not.
    """
    if stream.holds(changeset):
        raise IntegrityError(
            f"files of {changeset.id} have vanished from the spool {stream.spool.folder}",
            hint="stop the process server and remove the machine's folder from the spool: "
            "its agent then sends again what is not applied",
        )


async def _first_of(task: "asyncio.Task[None]", event: asyncio.Event) -> None:
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()

"""From the spool into the cache storage account, a machine's changesets in order.

Segments go side by side, those of large changesets ahead of their commit (`upload_order.py`); a
manifest is put when its changeset is committed, and all its segments and all manifests before it
are acknowledged, so what exists in the cache is a prefix of the stream. What the cache acknowledges
it may yet forget: `watcher.py` looks after that.
"""

import asyncio

import structlog

from appliance.process_server.cache_account import CacheAccount
from appliance.process_server.changeset import Changeset, OpenAttempt
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.measures import Measures
from appliance.process_server.persistence import Persistence
from appliance.process_server.segment_file import Segment
from appliance.process_server.stream import Stream, held_in_order
from appliance.process_server.upload_budget import UploadBudget
from appliance.process_server.upload_order import AHEAD_BYTES_MIN, UploadOrder
from replication.cache_layout import container_name, manifest_name, segment_name
from replication.errors import IntegrityError, UnavailableError

_log = structlog.get_logger()


class Uploader:
    """Puts changesets of any machine; one per process, so that the budget holds for all.

    ahead_bytes_min: so much of a changeset must have come before its upload begins.
    """

    def __init__(
        self,
        cache: CacheAccount,
        disk: DiskThreads,
        budget: UploadBudget,
        persistence: Persistence,
        measures: Measures,
        *,
        recheck_seconds: float,
        ahead_bytes_min: int = AHEAD_BYTES_MIN,
    ) -> None:
        self._cache = cache
        self._disk = disk
        self._budget = budget
        self._persistence = persistence
        self._measures = measures
        self._recheck_seconds = recheck_seconds
        self._ahead_bytes_min = ahead_bytes_min

    async def run(self, stream: Stream) -> None:
        """Upload what comes into ``stream``, until cancelled.

        Raises IntegrityError when a segment in the spool is damaged.
        """
        await self.note_present(stream)
        order = UploadOrder(self._ahead_bytes_min)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._put_manifests(stream))
            while True:
                stream.moved.clear()
                due = order.take(stream)
                if due is None:
                    await stream.moved.wait()
                    continue
                await self._begin(tasks, stream, due.of, due.segment)

    async def _put_manifests(self, stream: Stream) -> None:
        while True:
            stream.moved.clear()
            oldest = next((one for one in held_in_order(stream) if not one.whole), None)
            if oldest is not None and oldest.lacks_manifest:
                await self.put_manifest(stream, oldest)
                stream.moved.set()
            else:
                await stream.moved.wait()

    async def note_present(self, stream: Stream) -> None:
        """After a restart: what the cache holds of the stream need not be sent again, and what an
        earlier run had begun has ended with it.
        """
        for attempt in stream.attempts.values():
            attempt.uploads.begun = set(attempt.uploads.done)
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
                if segment.index not in changeset.uploads.done:
                    await self._begin(tasks, stream, changeset, segment)

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

    async def _begin(
        self,
        tasks: asyncio.TaskGroup,
        stream: Stream,
        of: Changeset | OpenAttempt,
        segment: Segment,
    ) -> None:
        """Put a segment in a task, once there is a place for it. The place is given back when the
        task is over, also one that is cancelled before its first step.
        """

        def end(_: "asyncio.Task[None]") -> None:
            self._budget.give_back(segment.size_bytes)
            stream.moved.set()

        await self._budget.take(segment.size_bytes)
        putting = self._put(stream, of, segment, over=False)
        try:
            task = tasks.create_task(putting)
        except RuntimeError:  # the group is ending
            putting.close()
            self._budget.give_back(segment.size_bytes)
            raise
        task.add_done_callback(end)

    async def _put(
        self, stream: Stream, of: Changeset | OpenAttempt, segment: Segment, *, over: bool
    ) -> None:
        name = segment_name(of.id.stamp.number, of.id.attempt, segment.index)
        container = container_name(stream.machine, of.id.stamp)

        async def put() -> None:
            _refuse_pruned(stream, of)
            content = await self._disk.run(stream.spool.read_segment, of.id, segment)
            await self._cache.put(container, name, content, over=over)

        try:
            await self._persistence.insist(put)
        except FileNotFoundError:
            _refuse_lost(stream, of)
        else:
            self._measures.bytes_uploaded.inc(segment.size_bytes)
        of.uploads.done.add(segment.index)

    async def _wake(self, stream: Stream) -> None:
        try:
            await self._cache.wake(stream.machine)
        except UnavailableError as error:
            # The applier's sweep finds the manifest all the same, some seconds later.
            _log.debug("wake-up lost", machine=str(stream.machine), reason=str(error))


def note_uploaded(changeset: Changeset, sizes: dict[str, int]) -> None:
    """Take from a container's listing what is there of ``changeset``."""
    number, attempt = changeset.stamp.number, changeset.id.attempt
    changeset.uploads.done = {
        segment.index
        for segment in changeset.segments
        if sizes.get(segment_name(number, attempt, segment.index)) == segment.size_bytes
    }
    changeset.uploads.begun = set(changeset.uploads.done)
    changeset.whole = (
        len(changeset.uploads.done) == len(changeset.segments)
        and sizes.get(manifest_name(number)) == changeset.manifest_bytes
    )


def _refuse_pruned(stream: Stream, one: Changeset | OpenAttempt) -> None:
    """What is applied or let go of is not put: its container may be dropped by now, and would
    come back.
    """
    if not stream.has(one):
        raise FileNotFoundError(str(one.id))


def _refuse_lost(stream: Stream, one: Changeset | OpenAttempt) -> None:
    """A file that is gone is fine if its changeset is dropped, also when another one has taken its
    stamp since; it is damage if not.
    """
    if stream.has(one):
        raise IntegrityError(
            f"files of {one.id} have vanished from the spool {stream.spool.folder}",
            hint="stop the process server and remove the machine's folder from the spool: "
            "its agent then sends again what is not applied",
        )

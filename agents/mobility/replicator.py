"""The agent's main loop: when to take a changeset, and what is remembered around it.

The order of the durable steps around a commit:

1. the blocks of the changeset are written beside the state (``retain``);
2. the state says that its commit is pending (number and attempt);
3. the commit is sent and acknowledged;
4. the state says that it is committed, and ``todo`` no longer holds its blocks: one write.

A crash before 3 leaves a pending commit that the process server does not know: dropped, taken anew.
A crash after 3 leaves one that it knows: finished at the next start. Between 2 and 4 the trackers
are not swapped, so ``todo`` does not change and step 4 can be repeated.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import structlog

from agents.mobility.capture import Capture, Taken
from agents.mobility.config import AgentConfig
from agents.mobility.frame_builder import SegmentBuilder
from agents.mobility.freeze import Freezer
from agents.mobility.reconcile import (
    DropPending,
    FinishPending,
    Fold,
    GoOn,
    NewGeneration,
    reconcile,
)
from agents.mobility.source import SourceDisk, is_dirty
from agents.mobility.status import AgentStatus, ChangesetRecord
from agents.mobility.stream_client import StreamClient
from agents.mobility.stream_state import Pending, StreamStateFile, merge, size_of, subtract
from agents.mobility.upload import upload
from daemon.service import Service
from replication.block_set import BlockSet
from replication.bookmark import Bookmark, Stamp
from replication.envelope import AttemptSealer
from replication.errors import (
    CaptureError,
    OutOfOrderError,
    PeerError,
    StorageError,
    TrackingError,
)
from replication.manifest import Manifest
from replication.stream import StreamState

TICK_SECONDS = 0.5
POLL_SECONDS = 2.0
IDLE_POLL_SECONDS = 15.0
SEALING_THREADS = 2
TROUBLE_SECONDS = 2.0
REPORT_SECONDS = 1.0
RECONCILE_STEPS_MAX = 8


@dataclass(slots=True)
class _Clock:
    """When what is due, in monotonic seconds."""

    changeset_at: float = 0.0
    heartbeat_at: float = 0.0
    app_at: float = float("inf")
    poll_at: float = 0.0


class Replicator:
    """Replicates one machine until told to stop."""

    def __init__(
        self,
        config: AgentConfig,
        disks: Sequence[SourceDisk],
        *,
        state: StreamStateFile,
        client: StreamClient,
        freezer: Freezer,
        service: Service,
        interrupted: str,
    ) -> None:
        self._config = config
        self._disks = disks
        self._state = state
        self._client = client
        self._freezer = freezer
        self._service = service
        self._interrupted = interrupted
        self._data_key = config.data_key()
        self._executor = ThreadPoolExecutor(SEALING_THREADS, thread_name_prefix="seal")
        self._clock = _Clock()
        self._stream: StreamState | None = None
        self.status = AgentStatus.of(config, disks)

    async def run(self) -> None:
        """Run until ``service.stop`` is set."""
        log = structlog.get_logger()
        await self._reconcile(await self._poll())
        if self._config.app_consistency.interval_seconds:
            self._clock.app_at = time.monotonic()
        while not self._service.stop.is_set():
            try:
                await self._tick()
                self._service.health.report("capture")
            except OutOfOrderError as error:
                log.warning("the stream is out of order", told=str(error))
                await self._pause(TROUBLE_SECONDS)
                if not self._service.stop.is_set():
                    await self._reconcile(await self._poll())
            except (CaptureError, PeerError, StorageError) as error:
                if self._service.stop.is_set():
                    return
                self._service.health.report("capture", warning=str(error))
                log.warning("changeset given up", reason=str(error))
                await self._pause(TROUBLE_SECONDS)

    async def _tick(self) -> None:
        now = time.monotonic()
        if now >= self._clock.poll_at:
            stream = await self._poll()
            if stream.committed.number < self._state.position.committed or stream.watermark.lost:
                await self._reconcile(stream)
        app = now >= self._clock.app_at
        if app or self._is_due(now):
            await self._changeset(app=app and bool(self._state.position.seeded))
        else:
            await self._pause(TICK_SECONDS)

    def _is_due(self, now: float) -> bool:
        if now < self._clock.changeset_at:
            return False
        repair = self._stream is not None and self._stream.watermark.repair.request
        return (
            not self._state.position.seeded
            or now >= self._clock.heartbeat_at
            or bool(repair and repair > self._state.position.repairing)
            or any(self._state.todo.values())
            or is_dirty(self._disks)
        )

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._service.stop.wait(), seconds)
        except TimeoutError:
            return

    async def _poll(self) -> StreamState:
        """Ask the process server where it is, and let go of what is applied."""
        stream = await self._client.state()
        await self._learn(stream)
        return stream

    async def _learn(self, stream: StreamState) -> None:
        self._stream = stream
        applied = stream.watermark.applied
        position = self._state.position
        if applied.generation == position.generation and applied > position.applied:
            self._state.position = replace(position, applied=applied)
        retained = self._state.retained()
        done = [n for n in retained if n <= self._state.position.applied.number]
        if self._state.position.applied.generation == position.generation and done:
            await asyncio.to_thread(self._let_go, done)
        waiting = len(retained) - len(done)
        self._clock.poll_at = time.monotonic() + (POLL_SECONDS if waiting else IDLE_POLL_SECONDS)
        self.status.learn(stream, self._state)

    def _let_go(self, applied: Sequence[int]) -> None:
        """Drop block sets of applied changesets, once it is durable that they are applied."""
        self._state.save()
        self._state.forget(applied)

    async def _reconcile(self, stream: StreamState) -> None:
        """Bring memory and process server together; see ``reconcile.py`` for the decisions."""
        log = structlog.get_logger()
        for _ in range(RECONCILE_STEPS_MAX):
            decision = reconcile(
                self._state.position,
                self._state.retained(),
                stream,
                interrupted=self._interrupted,
            )
            match decision:
                case GoOn():
                    break
                case FinishPending():
                    log.info("the pending changeset had been acknowledged")
                    await asyncio.to_thread(self._finish)
                case DropPending():
                    log.info("the pending changeset had not been acknowledged; it is taken anew")
                    await asyncio.to_thread(self._drop_pending)
                case Fold(since=since, lost=lost):
                    log.warning(
                        "changesets were lost upstream; sending again", since=since, lost=lost
                    )
                    await asyncio.to_thread(self._fold, since, lost)
                case NewGeneration(reason=reason):
                    log.warning("a new generation begins", reason=reason)
                    await asyncio.to_thread(self._begin_generation, stream)
        else:
            raise PeerError("agent and process server do not come to agree")
        self._check_disks()
        self._clock.changeset_at = 0.0

    def _finish(self) -> None:
        """Take note of an acknowledged commit: step 4."""
        pending = self._state.position.pending
        assert pending is not None
        number = pending.stamp.number
        subtract(self._state.todo, self._state.read_retained(number))
        position = self._state.position
        self._state.save(
            committed=number,
            attempt=pending.attempt,
            since=number,
            pending=None,
            seeded=position.seeded or pending.whole,
            repaired=position.repairing if pending.whole else position.repaired,
        )

    def _drop_pending(self) -> None:
        """The commit was not taken: its blocks are still in ``todo``."""
        pending = self._state.position.pending
        assert pending is not None
        self._state.save(pending=None)
        self._state.forget([pending.stamp.number])

    def _fold(self, since: int, lost: tuple[int, ...]) -> None:
        for number in lost:
            merge(self._state.todo, self._state.read_retained(number))
        self._state.save(since=since)
        self._state.forget(lost)

    def _begin_generation(self, stream: StreamState) -> None:
        """All blocks of all disks are to do; the trackers run already, so none is missed."""
        known = (
            self._state.position.generation,
            stream.committed.generation,
            stream.watermark.applied.generation,
        )
        self._state.todo = {disk.index: BlockSet.full(disk.block_count) for disk in self._disks}
        self._state.save(
            generation=max(known) + 1,
            committed=0,
            since=0,
            pending=None,
            seeded=False,
            repaired=stream.watermark.repair.request,
            repairing=stream.watermark.repair.request,
            audit_chunk=0,
            identities={disk.index: disk.device.identity for disk in self._disks},
        )
        self._state.drop_strays()
        self._interrupted = ""

    def _check_disks(self) -> None:
        """A disk whose size has changed under us is another disk to the tracker."""
        for disk in self._disks:
            now_bytes = disk.device.size_now_bytes()
            if now_bytes != disk.shape.size_bytes:
                raise TrackingError(
                    f"{disk.shape.name} has {now_bytes} bytes now, not {disk.shape.size_bytes}",
                    hint="the agent starts again and begins a new generation if the disk grew",
                )

    def _take_up_repair(self) -> None:
        """Add what the applier asks for to ``todo``, durably."""
        if self._stream is None:
            return
        repair = self._stream.watermark.repair
        if repair.request <= self._state.position.repairing:
            return
        for run in repair.runs:
            blocks = self._state.todo.get(run.disk)
            if blocks is not None and run.block < blocks.block_count:
                blocks.add_run(run.block, min(run.count, blocks.block_count - run.block))
        self._state.save(repairing=repair.request)
        structlog.get_logger().warning(
            "blocks are sent again for repair", request=repair.request, runs=len(repair.runs)
        )

    async def _changeset(self, *, app: bool) -> None:
        """Take one changeset, send it, commit it."""
        began = time.monotonic()
        self._check_disks()
        await asyncio.to_thread(self._take_up_repair)
        position = self._state.position
        stamp = Stamp(position.generation, position.committed + 1)
        sealer = AttemptSealer(
            self._data_key, self._config.machine, stamp, level=self._config.send.zstd_level
        )
        aborted = threading.Event()

        def capture(builder: SegmentBuilder) -> Taken:
            self.status.builder = builder
            return Capture(
                disks=self._disks,
                state=self._state,
                freezer=self._freezer,
                builder=builder,
                config=self._config.capture,
                app=self._config.app_consistency if app else None,
                aborted=aborted,
            ).run()

        self.status.begin(stamp, size_of(self._state.todo))
        reporting = asyncio.create_task(self._report(), name="status")
        try:
            taken, builder = await self._upload(sealer, capture, aborted)
        finally:
            reporting.cancel()
        manifest = self._manifest(sealer, taken, builder)
        await asyncio.to_thread(self._make_pending, manifest, taken)
        stream = await self._client.commit(stamp, manifest.seal(sealer))
        await asyncio.to_thread(self._finish)
        self.status.committed_changeset(
            ChangesetRecord.of(manifest, time.monotonic() - began, size_of(self._state.todo))
        )
        await self._learn(stream)
        self._schedule(began, taken, app=app)

    async def _report(self) -> None:
        """Write the progress of the changeset under way from time to time."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self.status.write()

    async def _upload(
        self,
        sealer: AttemptSealer,
        capture: Callable[[SegmentBuilder], Taken],
        aborted: threading.Event,
    ) -> tuple[Taken, SegmentBuilder]:
        return await upload(
            self._client,
            sealer,
            self._executor,
            capture,
            aborted,
            segment_bytes=self._config.send.segment_bytes,
            in_flight_max=self._config.send.segments_in_flight_max,
        )

    def _manifest(self, sealer: AttemptSealer, taken: Taken, builder: SegmentBuilder) -> Manifest:
        position = self._state.position
        return Manifest(
            machine=self._config.machine,
            bookmark=Bookmark(sealer.stamp, taken.time_ns, taken.consistency, taken.reason),
            since=position.since,
            attempt=sealer.attempt,
            disks=tuple(disk.shape for disk in self._disks),
            segments=tuple(builder.entries),
            changed_bytes=builder.changed_blocks * 4096,
            captured_ns=taken.captured_ns,
            pause_ns=taken.pause_ns,
            initial=not position.seeded and not taken.whole,
            repaired=position.repairing if taken.whole else position.repaired,
            applied=position.applied,
            tracker=self._config.tracker,
            audit=taken.audit,
        )

    def _make_pending(self, manifest: Manifest, taken: Taken) -> None:
        """Steps 1 and 2."""
        self._state.retain(manifest.stamp.number, manifest.since, taken.sent)
        self._state.save(
            pending=Pending(manifest.stamp, manifest.attempt, taken.whole),
            audit_chunk=taken.audit_chunk,
        )

    def _schedule(self, began: float, taken: Taken, *, app: bool) -> None:
        """When the next changeset may begin: sooner than the pause budget allows never."""
        capture = self._config.capture
        pause_seconds = taken.pause_ns / 1e9
        spacing = max(capture.interval_seconds, pause_seconds / capture.pause_share_max)
        self._clock.changeset_at = began + (spacing if taken.whole else 0.0)
        self._clock.heartbeat_at = began + max(capture.heartbeat_seconds, spacing)
        if app:
            self._clock.app_at = began + self._config.app_consistency.interval_seconds

"""The agent's main loop: when to take a changeset, and how it goes out.

What is remembered around it, and in which order, is in ``bookkeeping.py``; how a resync goes, in
``resync.py``.
"""

import asyncio
import datetime as dt
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from agents.mobility.bookkeeping import (
    finish,
    learn_applied,
    make_pending,
    require_resync,
    settle,
    take_up_repair,
)
from agents.mobility.capture import Capture, Taken
from agents.mobility.changeset import ChangesetSender, log_remarkable
from agents.mobility.config import AgentConfig
from agents.mobility.final_order import FinalBook
from agents.mobility.final_run import Finale
from agents.mobility.frame_builder import SegmentBuilder
from agents.mobility.freeze import Freezer
from agents.mobility.interruption import Interruption
from agents.mobility.leave import Leave, clear_order
from agents.mobility.reconcile import believed
from agents.mobility.resync import Resynchroniser
from agents.mobility.resync_stage import Stage
from agents.mobility.source import SourceDisk, is_dirty
from agents.mobility.status import AgentStatus
from agents.mobility.stream_client import StreamClient
from agents.mobility.stream_state import Pending, StreamStateFile
from daemon.service import Service
from replication.bookmark import Bookmark, Consistency, Stamp
from replication.control.assignment import ResyncOrder
from replication.control.report import ResyncCause
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
from replication.watermark import NO_ATTEMPT, WatermarkKey

TICK_SECONDS = 0.5
POLL_SECONDS = 2.0
IDLE_POLL_SECONDS = 15.0
TROUBLE_SECONDS = 2.0
WATCH_SECONDS = 1.0
LET_GO_SECONDS = 2.0
"""How long it may take until what is under way notices by itself that a disk has gone."""


@dataclass(slots=True)
class _Clock:
    """When what is due, in monotonic seconds."""

    changeset_at: float = 0.0
    heartbeat_at: float = 0.0
    app_at: float = float("inf")
    poll_at: float = 0.0


class Replicator:
    """Replicates one machine until told to stop.

    interrupted: why what the trackers know does not join on to ``state``; None if it does.
    order:       asked at every turn for the newest word on resyncs; by default what the
                 configuration says.
    final:       orders for a final changeset, where somebody can give any.
    """

    def __init__(
        self,
        config: AgentConfig,
        disks: Sequence[SourceDisk],
        *,
        state: StreamStateFile,
        client: StreamClient,
        freezer: Freezer,
        service: Service,
        interrupted: Interruption | None,
        order: Callable[[], ResyncOrder] | None = None,
        final: FinalBook | None = None,
    ) -> None:
        self._config = config
        self._disks = disks
        self._state = state
        self._client = client
        self._freezer = freezer
        self._service = service
        self._interrupted = interrupted
        self._data_key = config.data_key()
        self._watermark_key = WatermarkKey(self._data_key, config.machine)
        self._leave = Leave.parse(config.resync)
        self._order = order or self._own_order
        self._clock = _Clock()
        self._stream: StreamState | None = None
        self.status = AgentStatus.of(config, disks)
        self._sender = ChangesetSender(
            config, disks, state=state, client=client, stop=service.stop, status=self.status
        )
        self._final = None
        if final is not None:
            self._final = Finale(
                config,
                disks,
                state=state,
                freezer=freezer,
                service=service,
                sender=self._sender,
                poll=self._poll,
                learn=self._learn,
                book=final,
            )
        self._resync = Resynchroniser(
            config=config,
            disks=disks,
            state=state,
            client=client,
            poll=self._poll,
            send_empty=self._send_empty,
            service=service,
            status=self.status,
        )

    async def run(self) -> None:
        """Run until ``service.stop`` is set.

        Raises TrackingError when a disk has gone, or is another one; ``service.stop`` is set then
        if it takes that to come away from a process server that does not answer.
        """
        work = asyncio.create_task(self._work(), name="replicator")
        gone: TrackingError | None = None
        try:
            while gone is None and not work.done():
                await asyncio.wait({work}, timeout=WATCH_SECONDS)
                gone = self._gone()
            if gone is not None:
                await asyncio.wait({work}, timeout=LET_GO_SECONDS)
                self._service.stop.set()
            await work
        finally:
            if not work.done():
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
        if gone is not None:
            raise gone

    async def _work(self) -> None:
        log = structlog.get_logger()
        settled = False
        if self._final is not None:
            await self._final.begin()
        if self._interrupted is not None:
            # Durable before anything is sent, or forgotten by a tracker.
            cause, reason = self._interrupted.cause, self._interrupted.reason
            log.warning("a resync is required", cause=cause.value, reason=reason)
            await asyncio.to_thread(require_resync, self._state, cause, reason)
        self._resync.tell()
        if self._config.app_consistency.interval_seconds:
            self._clock.app_at = time.monotonic()
        while not self._service.stop.is_set():
            try:
                # A commit whose answer was not understood may have been taken. Before that is known
                # the trackers must not be swapped: see bookkeeping.py.
                if not settled or self._state.position.pending is not None:
                    await self._reconcile(await self._poll())
                    settled = True
                await self._tick()
                self._service.health.report("capture")
            except (CaptureError, PeerError, StorageError) as error:
                if self._service.stop.is_set():
                    return
                if isinstance(error, OutOfOrderError):
                    settled = False
                self._service.health.report("capture", warning=str(error))
                log.warning("changeset given up", reason=str(error))
                await self._pause(TROUBLE_SECONDS)

    async def _tick(self) -> None:
        now = time.monotonic()
        final = self._final if self._final is not None and self._final.is_due else None
        if final is not None or now >= self._clock.poll_at:
            stream = await self._poll()
            position = self._state.position
            ours = Stamp(position.generation, position.committed)
            if stream.committed < ours or self._is_contradicted(stream):
                await self._reconcile(stream)
        self._check_disks()
        if final is not None:
            await self._take_up_repair()  # after the last changeset nobody could send it
            return await final.carry_out() if final.is_due else None
        await self._take_up(self._order())
        if self._state.position.stage in (Stage.REQUIRED, Stage.COMPARING):
            return await self._resync.turn(self._stream, self._order())
        app = now >= self._clock.app_at
        if app or self._is_due(now):
            await self._changeset(app=app and bool(self._state.position.seeded))
        else:
            await self._pause(TICK_SECONDS)
        return None

    def _own_order(self) -> ResyncOrder:
        """Without a config server."""
        now = dt.datetime.now().astimezone()
        return self._leave.order(now, self._state.folder, self._state.position.resync_request)

    async def _take_up(self, order: ResyncOrder) -> None:
        """An operator wants a resync, of a healthy machine too. One that is sending is let end."""
        position = self._state.position
        under_way = position.stage is Stage.SENDING or not (position.seeded or position.resync)
        if order.request > position.resync_request and not under_way:
            structlog.get_logger().info("a resync was ordered", request=order.request)
            await asyncio.to_thread(
                require_resync,
                self._state,
                ResyncCause.OPERATOR,
                "an operator ordered it",
                ordered=True,
                request=order.request,
            )
            await asyncio.to_thread(clear_order, self._state.folder)

    def _is_due(self, now: float) -> bool:
        if now < self._clock.changeset_at:
            return False
        repair = self._stream is not None and self._stream.watermark.repair.request
        return (
            not self._state.position.seeded
            or now >= self._clock.heartbeat_at
            or bool(repair and repair != self._state.position.repairing)
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
        return await self._learn(await self._client.state())

    async def _learn(self, told: StreamState) -> StreamState:
        """Take note of what the process server says; what of it is believed."""
        stream = self._stream = self._believed(told)
        applied = stream.watermark.applied
        waiting = await asyncio.to_thread(learn_applied, self._state, applied)
        seconds = POLL_SECONDS if waiting else IDLE_POLL_SECONDS
        if self._state.position.stage in (None, Stage.SENDING) and self._is_contradicted(stream):
            seconds = 0.0  # else one commit after the other could keep it from being heeded
        self._clock.poll_at = time.monotonic() + seconds
        self._resync.tell()
        self.status.learn(stream, self._state)
        return stream

    def _is_contradicted(self, stream: StreamState) -> bool:
        """Whether the store cannot go on, or has what this stream has not sent: another one's."""
        position, told = self._state.position, stream.watermark
        used = Stamp(position.generation, max(position.committed, position.used))
        if told.lost or told.applied > used:
            return True
        newest = Stamp(position.generation, position.committed)
        is_ours = told.attempt in (position.attempt, NO_ATTEMPT)
        return told.applied == newest and newest.number > 0 and not is_ours

    def _believed(self, told: StreamState) -> StreamState:
        stream, is_strange = believed(told, self._watermark_key)
        warning = (
            "the watermark is not authentic, so nothing counts as applied: the applier is older "
            "than this agent, has another data key, or somebody else writes into the cache storage "
            "account"
        )
        self._service.health.report("watermark", warning=warning if is_strange else "")
        return stream

    async def _reconcile(self, stream: StreamState) -> None:
        """Bring memory and process server together."""
        await asyncio.to_thread(
            settle,
            self._state,
            stream,
            {disk.index: disk.block_count for disk in self._disks},
            {disk.index: disk.device.identity for disk in self._disks},
        )
        self._check_disks()
        self._clock.changeset_at = 0.0

    def _check_disks(self) -> None:
        """A disk that goes must be let go; one whose size has changed is another to the tracker."""
        if (gone := self._gone()) is not None:
            raise gone
        for disk in self._disks:
            now_bytes = disk.device.size_now_bytes()
            if now_bytes != disk.shape.size_bytes:
                raise TrackingError(
                    f"{disk.shape.name} has {now_bytes} bytes now, not {disk.shape.size_bytes}",
                    hint="the agent starts again and compares the disks if this one grew",
                )

    def _gone(self) -> TrackingError | None:
        for disk in self._disks:
            if why := disk.device.why_gone():
                return TrackingError(
                    f"{disk.shape.name}: {why}",
                    hint="when it comes back it is compared with the second site, unless it was "
                    "never away",
                )
        return None

    async def _changeset(self, *, app: bool) -> None:
        """Take one changeset, send it, commit it."""
        began = time.monotonic()
        self._check_disks()
        await self._take_up_repair()

        def capture(builder: SegmentBuilder, aborted: threading.Event) -> Capture:
            return Capture(
                disks=self._disks,
                state=self._state,
                freezer=self._freezer,
                builder=builder,
                config=self._config.capture,
                app=self._config.app_consistency if app else None,
                aborted=aborted,
            )

        seeded = self._state.position.seeded
        sent = await self._sender.send(capture)
        await self._learn(sent.told)
        log_remarkable(sent, app=app, first=self._state.position.seeded and not seeded)
        self._schedule(began, sent.taken, app=app and sent.taken.whole)

    async def _take_up_repair(self) -> None:
        # A request that is too long to be told lacks its runs: only a resync brings them.
        if self._stream is not None and not self._stream.watermark.lost:
            await asyncio.to_thread(take_up_repair, self._state, self._stream.watermark.repair)

    async def _send_empty(self, reason: str) -> None:
        """Send and commit the changeset that begins a resync."""
        position = self._state.position
        assert position.stage is Stage.COMPARING
        assert position.since == 0
        stamp = position.next_stamp
        sealer = AttemptSealer(self._data_key, self._config.machine, stamp)
        now_ns = time.time_ns()
        manifest = Manifest(
            machine=self._config.machine,
            bookmark=Bookmark(stamp, now_ns, Consistency.NONE, reason),
            since=0,
            attempt=sealer.attempt,
            disks=tuple(disk.shape for disk in self._disks),
            segments=(),
            changed_bytes=0,
            captured_ns=now_ns,
            initial=True,
            repaired=position.repaired,
            applied=position.applied,
            tracker=self._config.tracker,
            resync=True,
        )
        await asyncio.to_thread(
            make_pending,
            self._state,
            Pending(stamp, manifest.attempt, whole=False),
            {},
            audit_chunk=position.audit_chunk,
        )
        stream = await self._client.commit(stamp, manifest.seal(sealer))
        await asyncio.to_thread(finish, self._state)
        await self._learn(stream)

    def _schedule(self, began: float, taken: Taken, *, app: bool) -> None:
        """When the next changeset may begin: sooner than the pause budget allows never."""
        capture = self._config.capture
        pause_seconds = taken.pause_ns / 1e9
        spacing = max(capture.interval_seconds, pause_seconds / capture.pause_share_max)
        self._clock.changeset_at = began + (spacing if taken.whole else 0.0)
        self._clock.heartbeat_at = began + max(capture.heartbeat_seconds, spacing)
        if app:
            self._clock.app_at = began + self._config.app_consistency.interval_seconds

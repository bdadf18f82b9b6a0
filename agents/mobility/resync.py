"""A resync, turn by turn: wait for leave, close the old generation, compare; then send as usual.

Between the changeset that begins the generation and the end of the comparison nothing else is
sent, so the state that the sums are of stands still. Each step is durable before the next begins;
killed anywhere, the step is done once more.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from agents.mobility.bookkeeping import begin_resync, end_comparison, reopen
from agents.mobility.compare import Comparison
from agents.mobility.config import AgentConfig
from agents.mobility.resync_stage import Stage
from agents.mobility.source import SourceDisk
from agents.mobility.status import AgentStatus
from agents.mobility.stream_client import StreamClient
from agents.mobility.stream_state import StreamStateFile, merge, size_of
from agents.mobility.tracker.scan import ScanTracker
from daemon.service import Service
from replication.bookmark import Stamp
from replication.control.assignment import ResyncOrder
from replication.control.report import Phase
from replication.errors import CaptureError
from replication.manifest import NO_BASIS
from replication.stream import StreamState
from replication.sums import SumsPlace

WAIT_SECONDS = 0.5
"""Between two looks whether it may begin, and whether the sums have come."""

AGAIN_SECONDS = 60.0
"""Between two resyncs of one process: what one did not mend the next will not at once."""

SUMS_SECONDS_WARN = 60.0
"""How long the second site may take before the machine's health says so."""

BEHIND_SECONDS_MIN = 300.0
BEHIND_SECONDS_MAX = 3600.0
"""How long the store must be behind what begins the resync before another one is sent.

It may have gone back, or a process server that believed a forged watermark has let go of it: nobody
asks for what nobody knows of. Doubles each time, for it may as well be slow.
"""

PART = "resync"


class Resynchroniser:
    """Takes a machine through its resyncs; ``turn`` is called while one is required or compares."""

    def __init__(
        self,
        *,
        config: AgentConfig,
        disks: Sequence[SourceDisk],
        state: StreamStateFile,
        client: StreamClient,
        poll: Callable[[], Awaitable[StreamState]],
        send_empty: Callable[[str], Awaitable[None]],
        service: Service,
        status: AgentStatus,
    ) -> None:
        self._config = config
        self._disks = disks
        self._state = state
        self._client = client
        self._poll = poll
        self._send_empty = send_empty
        self._service = service
        self._status = status
        self._data_key = config.data_key()
        self._again_at = 0.0
        self._waits_since: float | None = None
        self._behind_since: float | None = None
        self._behind_seconds = BEHIND_SECONDS_MIN
        self._to_send_bytes = 0

    def tell(self) -> None:
        """Bring the status and the health up to where the resync is."""
        resync, status = self._state.position.resync, self._status
        status.resync_request = self._state.position.resync_request
        if resync is None:
            if status.phase in (Phase.RESYNC_REQUIRED, Phase.RESYNCHRONISING):
                status.enter(Phase.REPLICATING)
                self._service.health.report(PART)
            return
        required = resync.stage is Stage.REQUIRED
        phase = Phase.RESYNC_REQUIRED if required else Phase.RESYNCHRONISING
        status.enter(phase, cause=resync.cause, reason=resync.reason)
        if required:
            self._service.health.report(PART, warning=f"a resync is required: {resync.reason}")
        elif resync.stage is Stage.SENDING:
            left = size_of(self._state.todo)
            self._to_send_bytes = max(self._to_send_bytes, left)
            status.total_bytes, status.done_bytes = (
                self._to_send_bytes,
                self._to_send_bytes - left,
            )
            self._service.health.report(PART)

    async def turn(self, stream: StreamState | None, order: ResyncOrder) -> None:
        """Do what is next, or wait a little.

        Raises CaptureError when the sums cannot be used now, PeerError when what begins the
        generation is refused, StorageError when a disk or the state cannot be read or written.
        """
        self.tell()
        resync = self._state.position.resync
        assert resync is not None
        if resync.stage is Stage.COMPARING:
            if self._state.position.since == 0:
                await self._open(resync.reason)
            else:
                await self._compare(stream)
        elif (resync.ordered or order.allowed) and time.monotonic() >= self._again_at:
            await self._begin()
        else:
            self._status.write()
            await self._pause(WAIT_SECONDS)

    async def _begin(self) -> None:
        stream = await self._poll()
        self._again_at = time.monotonic() + AGAIN_SECONDS
        self._waits_since = self._behind_since = None
        self._behind_seconds = BEHIND_SECONDS_MIN
        self._to_send_bytes = 0
        await asyncio.to_thread(
            begin_resync,
            self._state,
            stream,
            {disk.index: disk.block_count for disk in self._disks},
            {disk.index: disk.device.identity for disk in self._disks},
        )
        structlog.get_logger().info("a resync begins", generation=self._state.position.generation)
        self.tell()

    async def _open(self, reason: str) -> None:
        """Close the generation before. The trackers' marks go into ``todo`` first."""
        await asyncio.to_thread(self._absorb)
        await self._send_empty(f"a resync begins: {reason}")

    def _absorb(self) -> None:
        """Take over what the trackers have marked; from here on a restart finds them joined on.

        A scan that has no table yet calls the whole disk changed. The comparison, which reads each
        block later than that scan, tells better.
        """
        for disk in self._disks:
            unknown = disk.tracker.fresh and isinstance(disk.tracker, ScanTracker)
            marked = disk.tracker.swap()
            if not unknown:
                merge(self._state.todo, {disk.index: marked})
        self._state.save()
        for disk in self._disks:
            disk.tracker.forget()

    async def _compare(self, stream: StreamState | None) -> None:
        position = self._state.position
        begun = Stamp(position.generation, position.committed)
        if stream is None or stream.watermark.applied != begun or stream.watermark.sums == NO_BASIS:
            await self._wait_for_sums(begun)
            return
        comparison = Comparison(
            self._disks,
            self._state,
            self._fetch,
            machine=self._config.machine,
            data_key=self._data_key,
            share_max=self._config.capture.compare_share_max,
            stopping=self._service.stop,
        )
        progress, status = comparison.progress, self._status

        def tell() -> None:
            status.total_bytes, status.done_bytes = progress.total_bytes, progress.done_bytes
            status.differing_bytes = progress.differing_bytes
            status.bytes_per_second = progress.bytes_per_second
            status.seconds_left = progress.seconds_left
            status.write()

        progress.tell = tell
        basis = stream.watermark.sums
        try:
            await comparison.run(begun, basis)
        except CaptureError as error:
            self._service.health.report(PART, warning=str(error))
            await self._pause(WAIT_SECONDS)
            await self._poll()
            raise
        stream = await self._poll()
        if (stream.watermark.applied, stream.watermark.sums) != (begun, basis):
            return  # the store has begun anew meanwhile: what was found stays to do
        await asyncio.to_thread(end_comparison, self._state)
        self._waits_since = None
        self.tell()

    async def _fetch(self, place: SumsPlace) -> bytes | None:
        generation = place.stamp.generation
        return await self._client.sums(generation, place.disk, place.level, place.part)

    async def _wait_for_sums(self, begun: Stamp) -> None:
        await self._pause(WAIT_SECONDS)
        if self._service.stop.is_set():
            return
        now = time.monotonic()
        stream = await self._poll()
        self._waits_since = self._waits_since or now
        waited = now - self._waits_since
        applied = stream.watermark.applied
        if applied < begun and not stream.watermark.is_blank:
            self._behind_since = self._behind_since or now
            if now - self._behind_since >= self._behind_seconds:
                structlog.get_logger().warning(
                    "the second site stays behind what begins the resync: it is sent once more",
                    applied=str(applied),
                    begun=str(begun),
                )
                self._behind_since = None
                self._behind_seconds = min(2 * self._behind_seconds, BEHIND_SECONDS_MAX)
                await asyncio.to_thread(reopen, self._state)
                return
        else:
            self._behind_since = None
        if waited >= SUMS_SECONDS_WARN:
            self._service.health.report(PART, warning=_complaint(stream, begun, waited))

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._service.stop.wait(), seconds)
        except TimeoutError:
            return


def _complaint(stream: StreamState, begun: Stamp, waited_seconds: float) -> str:
    """What a person must do while a resync does not go on."""
    watermark = stream.watermark
    if watermark.is_blank:
        what = "no applier tells of this machine: start the one that has it, and see its health"
    elif watermark.applied < begun:
        what = (
            f"the applier has applied {watermark.applied} and waits for {begun}: see its health, "
            "and the process server's backlog"
        )
    else:
        what = (
            "the applier has not put the sums of its state: see its health; where its store is "
            "damaged beyond reading, remove this machine from the store, and it is sent as a whole"
        )
    return f"the resync has waited for the second site for {waited_seconds:.0f} s: {what}"

"""One changeset on its way out: captured, sent, pending, committed, remembered."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from agents.mobility.bookkeeping import finish, make_pending
from agents.mobility.capture import Capture, Taken
from agents.mobility.config import AgentConfig
from agents.mobility.frame_builder import SegmentBuilder
from agents.mobility.source import SourceDisk
from agents.mobility.status import AgentStatus, ChangesetRecord
from agents.mobility.stream_client import StreamClient
from agents.mobility.stream_state import Pending, StreamStateFile, size_of
from agents.mobility.upload import upload
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Bookmark, Consistency, Stamp
from replication.envelope import AttemptSealer
from replication.manifest import Manifest
from replication.stream import StreamState

SEALING_THREADS = 2
REPORT_SECONDS = 1.0

MakeCapture = Callable[[SegmentBuilder, threading.Event], Capture]
"""Makes the capture of a changeset, from its builder and what ends it early."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A changeset that is acknowledged, and what the process server said with that."""

    stamp: Stamp
    taken: Taken
    told: StreamState


def log_remarkable(sent: Sent, *, app: bool, first: bool) -> None:
    """What happens to few changesets; the rest is in the status.

    app:   it was to be app-consistent. first: with it the machine is replicated wholly.
    """
    log = structlog.get_logger()
    if first:
        log.info("replicating", changeset=str(sent.stamp))
    if app and sent.taken.whole and sent.taken.consistency is not Consistency.APP:
        reason = sent.taken.reason or None
        log.warning("no app-consistent point", changeset=str(sent.stamp), reason=reason)


class ChangesetSender:
    """Takes changesets of one machine, one after the other."""

    def __init__(
        self,
        config: AgentConfig,
        disks: Sequence[SourceDisk],
        *,
        state: StreamStateFile,
        client: StreamClient,
        stop: asyncio.Event,
        status: AgentStatus,
    ) -> None:
        self._config = config
        self._disks = disks
        self._state = state
        self._client = client
        self._stop = stop
        self._status = status
        self._data_key = config.data_key()
        self._executor = ThreadPoolExecutor(SEALING_THREADS, thread_name_prefix="seal")

    async def send(self, make_capture: MakeCapture) -> Sent:
        """Take one changeset, send it, commit it; it is remembered as committed on return.

        Raises CaptureError, PeerError, StorageError. A commit that was sent and not understood is
        pending in the state then.
        """
        began = time.monotonic()
        stamp = self._state.position.next_stamp
        sealer = AttemptSealer(
            self._data_key, self._config.machine, stamp, level=self._config.send.zstd_level
        )
        aborted = threading.Event()

        def capture(builder: SegmentBuilder) -> Taken:
            self._status.builder = builder
            return make_capture(builder, aborted).run()

        self._status.begin(stamp, size_of(self._state.todo))
        reporting = asyncio.create_task(self._report(), name="status")
        stopping = asyncio.create_task(self._abort_on_stop(aborted), name="stop")
        try:
            taken, builder = await upload(
                self._client,
                sealer,
                self._executor,
                capture,
                aborted,
                segment_bytes=self._config.send.segment_bytes,
                in_flight_max=self._config.send.segments_in_flight_max,
            )
        finally:
            reporting.cancel()
            stopping.cancel()
            # How they ended matters to nobody: the next write of the status tells.
            await asyncio.gather(reporting, stopping, return_exceptions=True)
        manifest = self._manifest(sealer, taken, builder)
        await asyncio.to_thread(
            make_pending,
            self._state,
            Pending(stamp, manifest.attempt, taken.whole),
            taken.sent,
            audit_chunk=taken.audit_chunk,
        )
        told = await self._client.commit(stamp, manifest.seal(sealer))
        await asyncio.to_thread(finish, self._state)
        self._status.committed_changeset(
            ChangesetRecord.of(manifest, time.monotonic() - began, size_of(self._state.todo))
        )
        return Sent(stamp, taken, told)

    async def _report(self) -> None:
        """Write the progress of the changeset under way from time to time."""
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            self._status.write()

    async def _abort_on_stop(self, aborted: threading.Event) -> None:
        """A capture that only reads, of a scan or of holes, hears of it in no other way."""
        await self._stop.wait()
        aborted.set()

    def _manifest(self, sealer: AttemptSealer, taken: Taken, builder: SegmentBuilder) -> Manifest:
        position = self._state.position
        return Manifest(
            machine=self._config.machine,
            bookmark=Bookmark(sealer.stamp, taken.time_ns, taken.consistency, taken.reason),
            since=position.since,
            attempt=sealer.attempt,
            disks=tuple(disk.shape for disk in self._disks),
            segments=tuple(builder.entries),
            changed_bytes=builder.changed_blocks * BLOCK_BYTES,
            captured_ns=taken.captured_ns,
            pause_ns=taken.pause_ns,
            initial=not position.seeded and not taken.whole,
            repaired=position.repairing if taken.whole else position.repaired,
            applied=position.applied,
            tracker=self._config.tracker,
            basis=position.basis,
            origin=position.origin,
            audit=taken.audit,
        )

"""What the agent says of itself: a small file beside its state, for people and for health checks.

Written at each change by rename and not synced: it is news, not memory.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self
from uuid import UUID

from agents.mobility.config import AgentConfig
from agents.mobility.frame_builder import SegmentBuilder
from agents.mobility.source import SourceDisk
from agents.mobility.stream_state import StreamStateFile, size_of
from daemon.durable import storage_error
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Consistency, Stamp
from replication.control.report import Phase, ResyncCause
from replication.manifest import Manifest
from replication.stream import StreamState

STATUS_FILE = "status.json"
RECORDS_MAX = 100
_CARRIED = (
    "generation", "number", "committed", "applied", "durable_ns", "restorable_ns", "skew_ns",
    "changed_bytes", "sent_bytes", "consistency", "app_consistent_ns", "pauses", "pause_seconds",
    "records",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ChangesetRecord:
    """What a changeset came to."""

    changeset: str
    time_ns: int
    consistency: str
    reason: str
    changed_bytes: int
    sent_bytes: int
    pause_seconds: float
    taken_seconds: float
    left_bytes: int

    @classmethod
    def of(cls, manifest: Manifest, taken_seconds: float, left_bytes: int) -> Self:
        bookmark = manifest.bookmark
        return cls(
            changeset=str(manifest.stamp),
            time_ns=bookmark.time_ns,
            consistency=bookmark.consistency.value,
            reason=bookmark.reason,
            changed_bytes=manifest.changed_bytes,
            sent_bytes=manifest.sent_bytes,
            pause_seconds=manifest.pause_ns / 1e9,
            taken_seconds=taken_seconds,
            left_bytes=left_bytes,
        )


@dataclass(slots=True)
class AgentStatus:
    """The newest news; ``write`` after each change.

    generation, number:      of the newest changeset that was acknowledged.
    phase, cause, reason:    where replication is; ``enter`` moves it and tells ``on_phase``.
    done_bytes, total_bytes: of initial replication or resync; 0 of 0 when there is none.
    differing_bytes:         found by a resync's comparison; bytes_per_second and seconds_left are
                             its pace.
    resync_request:          the newest order to resync that was carried out.
    pauses, pause_seconds:   freezes since the start, and how long they lasted together.
    """

    path: str
    machine: str
    name: str
    tracker: str
    disks: list[dict[str, Any]]
    phase: Phase = Phase.IDLE
    cause: ResyncCause | None = None
    reason: str = ""
    state: str = "starting"
    trouble: str = ""
    under_way: str = ""
    todo_bytes: int = 0
    generation: int = 0
    number: int = 0
    committed: str = ""
    applied: str = ""
    durable_ns: int = 0
    restorable_ns: int = 0
    skew_ns: int = 0
    unapplied_count: int = 0
    changed_bytes: int = 0
    sent_bytes: int = 0
    done_bytes: int = 0
    total_bytes: int = 0
    differing_bytes: int = 0
    bytes_per_second: float = 0.0
    seconds_left: float = 0.0
    resync_request: int = 0
    consistency: str = ""
    app_consistent_ns: int = 0
    pauses: int = 0
    pause_seconds: float = 0.0
    under_way_bytes: int = 0
    on_phase: Callable[[], None] | None = None
    builder: SegmentBuilder | None = None
    records: deque[ChangesetRecord] = field(default_factory=lambda: deque(maxlen=RECORDS_MAX))

    @classmethod
    def of(cls, config: AgentConfig, disks: Sequence[SourceDisk]) -> Self:
        return cls(
            path=os.path.join(config.state_folder, str(config.machine), STATUS_FILE),
            machine=str(config.machine),
            name=config.name,
            tracker=config.tracker,
            disks=[asdict(disk.shape) for disk in disks],
        )

    @classmethod
    def idle(cls, state_folder: str, machine: UUID, name: str, *, tracker: str) -> Self:
        """Of a machine that is not protected."""
        path = os.path.join(state_folder, str(machine), STATUS_FILE)
        return cls(path, str(machine), name, tracker, [], state=Phase.IDLE.value)

    def carry_on(self, before: "AgentStatus") -> None:
        """Go on from the news of an earlier run of the same process."""
        for name in _CARRIED:
            setattr(self, name, getattr(before, name))
        if before.phase is not Phase.FAILED:
            self.enter(before.phase, cause=before.cause, reason=before.reason)

    def enter(self, phase: Phase, *, cause: ResyncCause | None = None, reason: str = "") -> None:
        """Replication is in ``phase`` from now on; whoever listens is told of a change."""
        before = (self.phase, self.cause, self.reason)
        self.phase, self.cause, self.reason = phase, cause, reason
        self.state = phase.value
        if phase in (Phase.IDLE, Phase.REPLICATING):
            self.done_bytes = self.total_bytes = self.differing_bytes = 0
            self.bytes_per_second = self.seconds_left = 0.0
        if (phase, cause, reason) != before and self.on_phase is not None:
            self.on_phase()

    def begin(self, stamp: Stamp, todo_bytes: int) -> None:
        self.under_way, self.todo_bytes = str(stamp), todo_bytes
        self.write()

    def committed_changeset(self, record: ChangesetRecord) -> None:
        self.records.append(record)
        self.under_way = ""
        self.builder = None
        self.todo_bytes = record.left_bytes
        self.changed_bytes += record.changed_bytes
        self.sent_bytes += record.sent_bytes
        self.consistency = record.consistency
        if record.consistency == Consistency.APP.value:
            self.app_consistent_ns = record.time_ns
        if record.pause_seconds:
            self.pauses += 1
            self.pause_seconds += record.pause_seconds
        self.write()

    def learn(self, stream: StreamState, state: StreamStateFile) -> None:
        position = state.position
        if self.phase not in (Phase.RESYNC_REQUIRED, Phase.RESYNCHRONISING):
            self.enter(Phase.REPLICATING if position.seeded else Phase.INITIAL)
        if self.phase is Phase.INITIAL:
            self.total_bytes = sum(disk["size_bytes"] for disk in self.disks)
            self.done_bytes = max(0, self.total_bytes - size_of(state.todo))
        self.generation, self.number = position.generation, position.committed
        self.committed = str(Stamp(position.generation, position.committed))
        self.applied = str(stream.watermark.applied)
        self.durable_ns = stream.durable_ns
        self.restorable_ns = stream.watermark.restorable_ns
        self.skew_ns = time.time_ns() - stream.time_ns
        self.unapplied_count = len(state.retained())
        self.write()

    def write(self) -> None:
        builder = self.builder
        self.under_way_bytes = builder.changed_blocks * BLOCK_BYTES if builder else 0
        tree = {
            name: getattr(self, name)
            for name in self.__slots__
            if name not in ("path", "builder", "on_phase")
        }
        tree["records"] = [asdict(record) for record in self.records]
        tree["pid"] = os.getpid()
        tree["written_ns"] = time.time_ns()
        pending = f"{self.path}.new"
        try:
            with open(pending, "w", encoding="utf-8") as file:
                json.dump(tree, file)
            os.rename(pending, self.path)
        except OSError as error:
            raise storage_error("write", self.path, error) from error

"""Taking one changeset: pre-copy rounds while the machine runs, then a short freeze.

Runs in a worker thread; what it reads goes to a SegmentBuilder, whose frames are numbered in the
order of reading. The steps and their order are the consistency argument:

1. *Absorb*: swap the bitmaps, make the closed one durable as part of ``todo``, let the tracker
   forget it. Then send what it named, read live. What is written meanwhile is in the new bitmap.
2. If nothing is in the new bitmaps after a round, what was read is exact: a point without a freeze.
   All disks are looked at twice, so that there is one instant at which none had changed.
3. Otherwise: ``syncfs``, absorb once more, FIFREEZE all file systems, look at the new bitmaps (not
   cleared: those blocks go again next time), read old and new into memory, FITHAW, send. It counts
   as one instant only if the kernel has counted no write to any disk meanwhile: see stillness.py.

A block that changed is in ``todo`` or in the running bitmap at every instant; a capture that ends
anywhere, also by SIGKILL, loses nothing and is taken anew.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from agents.mobility.app_scripts import clear_post_due, run_post, run_pre, set_post_due
from agents.mobility.audit import AuditSample, sample
from agents.mobility.config import AppConsistencyConfig, CaptureConfig
from agents.mobility.frame_builder import FrameContent, SegmentBuilder, contents, zero_contents
from agents.mobility.freeze import Freezer, sync_file_systems
from agents.mobility.reflink import ReflinkClone
from agents.mobility.source import SourceDisk, peek_running
from agents.mobility.stillness import WriteCounts, look, stood_still
from agents.mobility.stream_state import BlockSets, StreamStateFile, merge, size_of
from agents.mobility.tracker.scan import ScanTracker
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Consistency
from replication.errors import CaptureError
from replication.manifest import AuditDigest

SCAN_ROUNDS_MAX = 2
"""A scan reads whole disks: few rounds."""

CHANGESET_RUNS_MAX = 1 << 18
"""Runs of a part of a backlog: with the zeros between its data it stays below the million extents
that an applier takes in one changeset."""

SPARSE_LOOK_BYTES_MIN = 64 << 20
"""From this much on it pays to ask which blocks are holes before reading."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a capture came to.

    sent:        the blocks that the changeset holds.
    whole:       it holds all that was in ``todo``.
    audit_chunk: where the audit goes on.
    """

    time_ns: int
    captured_ns: int
    consistency: Consistency
    reason: str
    pause_ns: int
    sent: BlockSets
    whole: bool
    audit: tuple[AuditDigest, ...]
    audit_chunk: int


@dataclass(slots=True)
class Capture:
    """One changeset under way. ``run`` once.

    aborted: set from outside to end it early with a CaptureError.
    """

    disks: Sequence[SourceDisk]
    state: StreamStateFile
    freezer: Freezer
    builder: SegmentBuilder
    config: CaptureConfig
    app: AppConsistencyConfig | None = None
    aborted: threading.Event = field(default_factory=threading.Event)
    clock_ns: Callable[[], int] = time.time_ns
    _started_ns: int = 0
    _audit: AuditSample = field(default_factory=lambda: AuditSample([]))
    _audit_chunk: int = 0
    _touched: BlockSets = field(default_factory=dict)
    _promise: Consistency = Consistency.CRASH
    _post_due: bool = False

    def run(self) -> Taken:
        """Take the changeset; the builder has all its frames on return.

        Raises CaptureError when aborted, StorageError when a disk cannot be read.
        """
        self._started_ns = self.clock_ns()
        self._absorb()
        part = self._part_of_a_backlog()
        if part is not None:
            return self._end(Consistency.NONE, self._backlog_reason(), part, whole=False)
        self._send_live(self.state.todo)
        if self.app is None:
            return self._take_point()
        if self.app.post:
            set_post_due(self.state.folder)
        self._post_due = True
        try:
            report = run_pre(self.app.pre, self.app.script_seconds_max)
            self._promise = Consistency.APP if report.ok else Consistency.CRASH
            return self._take_point("" if report.ok else report.reason)
        finally:
            self._run_post()

    def _run_post(self) -> None:
        """The applications may go on: as soon as the file systems do, and once."""
        if self._post_due and self.app is not None:
            self._post_due = False
            run_post(self.app.post, self.app.script_seconds_max)
            clear_post_due(self.state.folder)

    def _take_point(self, downgraded: str = "") -> Taken:
        """What ``todo`` names has been sent; bring it to one instant.

        downgraded: why the point promises less than was asked for.
        """
        mounts, unreachable = self._mounts()
        chunks, self._audit_chunk = sample(
            self.disks, self.state.position.audit_chunk, self.config.audit_chunks
        )
        self._audit = AuditSample(chunks)
        self._touched = {}
        rounds = SCAN_ROUNDS_MAX if self._scanning else self.config.rounds_max
        last: BlockSets = {}
        for left in reversed(range(rounds)):
            quiet_ns = 0 if self.app and mounts else self._exactly_quiet_at()
            if quiet_ns:
                return self._end(self._promise, downgraded, self.state.todo, at_ns=quiet_ns)
            if mounts:
                sync_file_systems(mounts)
            last = self._absorb()
            if mounts and (size_of(last) <= self.config.freeze_bytes_max or not left):
                break
            self._send_live(last)
            last = {}
        if not mounts:
            return self._take_without_freeze(downgraded, unreachable)
        if size_of(last) > 2 * self.config.freeze_bytes_max:
            self._send_live(last)
            reason = f"the disks change faster than they can be read: {size_of(last)} bytes a round"
            return self._end(Consistency.NONE, reason, self.state.todo)
        return self._take_frozen(mounts, last, downgraded)

    def _take_frozen(self, mounts: Sequence[str], last: BlockSets, downgraded: str) -> Taken:
        try:
            self.freezer.freeze(mounts, self.config.freeze_seconds_max)
        except CaptureError as error:
            self._run_post()
            self._send_live(last)
            return self._end(Consistency.NONE, str(error), self.state.todo)
        read: list[FrameContent] = []
        broken = ""
        frozen_ns = self.clock_ns()
        peeked: BlockSets = {}
        try:
            counts = look([disk.device for disk in self.disks])
            peeked = peek_running(self.disks)
            wanted = union(last, peeked)
            if size_of(wanted) > 3 * self.config.freeze_bytes_max:
                broken = (
                    f"{size_of(wanted)} bytes had changed between the last round and the freeze"
                )
            else:
                read = list(self._contents(wanted))
                self._audit.refresh(union(self._touched, wanted))
            broken = broken or self._written_in_spite(peeked, counts)
        except CaptureError as error:
            broken = str(error)
        finally:
            result = self.freezer.thaw()
            self._run_post()
        if not result.held:
            broken = result.reason
        if not read:
            self._send_live(last)
        for content in read:
            self.builder.add(content)
        sent = union(self.state.todo, peeked) if read else self.state.todo
        if broken:
            return self._end(Consistency.NONE, broken, sent, pause_ns=result.pause_ns)
        return self._end(self._promise, downgraded, sent, at_ns=frozen_ns, pause_ns=result.pause_ns)

    def _written_in_spite(self, peeked: BlockSets, before: Sequence[WriteCounts]) -> str:
        """Why what was read since is not one instant; empty if it is."""
        for disk, then in zip(self.disks, before, strict=True):
            marked = disk.tracker.peek_running()
            if marked != peeked[disk.index] or not stood_still(then, WriteCounts.of(disk.device)):
                return (
                    f"{disk.shape.name} was written to while its file systems were frozen: "
                    "by swap, by an application on the raw disk, or by one that is not seen"
                )
        return ""

    def _mounts(self) -> tuple[list[str], str]:
        """Where to freeze, and why nowhere although there are file systems."""
        if self._scanning:
            return [], ""
        try:
            return [fs.mount_point for disk in self.disks for fs in disk.file_systems()], ""
        except CaptureError as error:
            return [], str(error)

    def _take_without_freeze(self, downgraded: str, unreachable: str) -> Taken:
        """No file system to freeze: every round has been sent; one more look, or a reflink."""
        quiet_ns = self._exactly_quiet_at()
        if quiet_ns:
            return self._end(self._promise, downgraded, self.state.todo, at_ns=quiet_ns)
        if self.config.raw_capture == "reflink" and len(self.disks) == 1 and not self._scanning:
            return self._take_reflink(self.disks[0], downgraded)
        reason = unreachable or (
            "the disk is written to all the time and has no file system that could be frozen"
        )
        return self._end(Consistency.NONE, reason, self.state.todo)

    def _take_reflink(self, disk: SourceDisk, downgraded: str) -> Taken:
        """A point of a busy disk. It has no audit.

        A write that had begun and not ended may be in the clone, and its block not in the
        changeset: a power cut could have left either, but their digests differ.
        """
        last = self._absorb()
        try:
            clone = ReflinkClone.of(disk.device)
        except CaptureError as error:
            self._send_live(last)
            return self._end(Consistency.NONE, str(error), self.state.todo)
        with clone:
            at_ns = clone.taken_ns
            peeked = peek_running(self.disks)
            wanted = union(last, peeked)
            for content in contents(disk.index, wanted[disk.index].runs(), clone.read_blocks):
                self.builder.add(content)
        self._audit, self._audit_chunk = AuditSample([]), self.state.position.audit_chunk
        # What ``todo`` has of ``peeked`` stays in it: the clone may hold half of a write whose end
        # this process alone will miss. See ``_end``.
        todo = self.state.todo[disk.index]
        sent = {disk.index: (todo | peeked[disk.index]) - (todo & peeked[disk.index])}
        return self._end(self._promise, downgraded, sent, at_ns=at_ns)

    def _exactly_quiet_at(self) -> int:
        """An instant of which both blocks and audit sample are exact; 0 if there was none."""
        quiet_ns = self._quiet_at()
        if not quiet_ns:
            return 0
        self._audit.refresh(self._touched)
        return quiet_ns if self._quiet_at() else 0

    def _quiet_at(self) -> int:
        """An instant at which no disk had changed since the last swap; 0 if there was none.

        A scan that finds nothing says so of the instant at which it began: each block was then as
        the scan before had seen it.
        """
        if self._scanning:
            began_ns = self.clock_ns()
            found = self._absorb()
            self._send_live(found)
            return 0 if any(found.values()) else began_ns
        if any(peek_running(self.disks).values()):
            return 0
        at_ns = self.clock_ns()
        return 0 if any(peek_running(self.disks).values()) else at_ns

    @property
    def _scanning(self) -> bool:
        return any(isinstance(disk.tracker, ScanTracker) for disk in self.disks)

    def _absorb(self) -> BlockSets:
        """Move what the trackers have marked into ``todo``, durably; return it."""
        # Else ``finish`` would take blocks out of ``todo`` that changed after they were sent.
        assert self.state.position.pending is None, "a pending commit is settled first"
        if self.aborted.is_set():
            raise CaptureError("the changeset was given up")
        taken = {disk.index: disk.tracker.swap() for disk in self.disks}
        if any(taken.values()):
            merge(self.state.todo, taken)
            merge_new(self._touched, taken)
            self.state.save()
        for disk in self.disks:
            disk.tracker.forget()
        return taken

    def _part_of_a_backlog(self) -> BlockSets | None:
        """When ``todo`` is more than one changeset holds: send a part of it, and say which."""
        budget = self.config.changeset_bytes_max
        if size_of(self.state.todo) <= min(budget, SPARSE_LOOK_BYTES_MIN):
            return None
        allocated = {disk.index: disk.allocated() for disk in self.disks}
        data = {disk: blocks & allocated[disk] for disk, blocks in self.state.todo.items()}
        holes = {disk: blocks - allocated[disk] for disk, blocks in self.state.todo.items()}
        runs = sum(blocks.run_count() for blocks in (*data.values(), *holes.values()))
        if size_of(data) <= budget and runs <= CHANGESET_RUNS_MAX:
            return None
        part: BlockSets = {}
        runs_left = CHANGESET_RUNS_MAX
        for disk in self.disks:
            taken = data[disk.index].first(budget // BLOCK_BYTES, runs_left)
            budget -= len(taken) * BLOCK_BYTES
            runs_left -= taken.run_count()
            empty = holes[disk.index].first(disk.block_count, runs_left)
            runs_left -= empty.run_count()
            part[disk.index] = taken | empty
        self._send_live(part, allocated)
        return part

    def _backlog_reason(self) -> str:
        if self.state.position.seeded:
            return "so much has changed that it is sent in several changesets"
        return "initial replication is under way"

    def _send_live(self, sets: BlockSets, allocated: BlockSets | None = None) -> None:
        for content in self._contents(sets, allocated):
            if self.aborted.is_set():
                raise CaptureError("the changeset was given up")
            self.builder.add(content)

    def _contents(
        self, sets: BlockSets, allocated: BlockSets | None = None
    ) -> Iterator[FrameContent]:
        """Read the blocks of ``sets`` as they are now; holes are not read where it pays to ask."""
        for disk in self.disks:
            blocks = sets.get(disk.index)
            if not blocks:
                continue
            if allocated is not None or len(blocks) * BLOCK_BYTES >= SPARSE_LOOK_BYTES_MIN:
                held = allocated[disk.index] if allocated is not None else disk.allocated()
                yield from zero_contents(disk.index, (blocks - held).runs())
                blocks = blocks & held
            yield from contents(disk.index, blocks.runs(), disk.read_blocks)

    def _end(
        self,
        consistency: Consistency,
        reason: str,
        sent: BlockSets,
        *,
        at_ns: int = 0,
        pause_ns: int = 0,
        whole: bool = True,
    ) -> Taken:
        restorable = consistency.restorable
        if not restorable:
            # Writes under way at the last swap may not have been there to be read: the tracker of
            # this process remembers them, and ``todo`` must, should another process come.
            sent = {
                disk.index: sent[disk.index] - disk.tracker.peek_running()
                for disk in self.disks
                if disk.index in sent
            }
        return Taken(
            time_ns=max(at_ns or self.clock_ns(), self._started_ns),
            captured_ns=self._started_ns,
            consistency=consistency,
            reason=reason,
            pause_ns=pause_ns,
            sent={disk: blocks.copy() for disk, blocks in sent.items()},
            whole=whole,
            audit=self._audit.digests() if restorable else (),
            audit_chunk=self._audit_chunk if restorable else self.state.position.audit_chunk,
        )


def merge_new(into: BlockSets, sets: BlockSets) -> None:
    """As ``merge``, and disks that ``into`` does not know yet come along."""
    for disk, blocks in sets.items():
        if disk in into:
            into[disk] |= blocks
        else:
            into[disk] = blocks.copy()


def union(left: BlockSets, right: BlockSets) -> BlockSets:
    """The blocks of both, as a set of their own."""
    made: BlockSets = {}
    merge_new(made, left)
    merge_new(made, right)
    return made

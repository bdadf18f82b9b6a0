"""The capture of a final changeset: frozen, and not thawed again.

Pre-copy rounds as in any capture, then FIFREEZE of all file systems, and only then the last blocks
are read, and sent while nothing moves. What cannot be frozen (swap, a raw disk) must have stood
still, by the kernel's counters, while the last blocks were read. From then on the counters alone
say whether the order holds, for whatever reason a write should come.

Source: docs/RECOVERY.md §4, docs/ARCHITECTURE.md §5.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import xxhash

from agents.mobility.audit import AuditSample, sample
from agents.mobility.capture import Capture, Taken, union
from agents.mobility.freeze import Freezer, FreezeResult, sync_file_systems
from agents.mobility.mounts import mounts_on, read_mounts
from agents.mobility.source import SourceDisk, peek_running
from agents.mobility.stillness import WriteCounts, look, stood_still
from agents.mobility.stream_state import BlockSets, size_of
from replication.errors import CaptureError, StorageError, TrackingError

FREEZING_SECONDS_MAX = 10.0
"""How long it may take until all file systems are frozen: writers wait already."""

STILL_SECONDS_MAX = 5.0
"""How long a disk that cannot be frozen may take to come to rest."""

STILL_PAUSE_SECONDS = 0.02
DIGEST_BLOCKS = 256
PARTING_SECONDS_MAX = 15.0
"""How long it may take until all disks are being detached and unmounted, once one is."""


class FinalRefusedError(CaptureError):
    """A final changeset cannot be had as the machine is; trying again at once does not help."""

    code = "final"


@dataclass(frozen=True, slots=True)
class Stillness:
    """The disks while nothing moved: the kernel's counters, which blocks were marked since the last
    swap, and the digest of these.
    """

    counts: Sequence[WriteCounts]
    marked: BlockSets
    digest: bytes


class FinalHold:
    """What is held still for a final changeset, and how that is known; safe from any thread.

    still:    what was the case when the last blocks were read; None until they were.
    run_post: what applications are owed once they may go on.
    """

    def __init__(
        self,
        disks: Sequence[SourceDisk],
        freezer: Freezer,
        *,
        is_frozen: bool,
        seconds_max: float,
        run_post: Callable[[], None],
    ) -> None:
        self._disks = disks
        self._freezer = freezer
        self.is_frozen = is_frozen
        self._seconds_max = seconds_max
        self._since = time.monotonic()
        self._run_post = run_post
        self._lock = threading.Lock()
        self._is_thawed = self._owes_nothing = self._is_over = False
        self._reason = "it was let go"
        self.still: Stillness | None = None

    @property
    def seconds(self) -> float:
        """How long it has been held."""
        return time.monotonic() - self._since

    def why_broken(self) -> str:
        """Why it is not held any more, or something was written; empty while all stands still."""
        with self._lock:
            if self._is_over:
                return ""
            if self._is_thawed:
                return self._reason
            return self._why_over() or self._why_changed()

    def release(self, reason: str) -> FreezeResult | None:
        """Thaw, and let the applications go on, each once; None where nothing was frozen.

        reason: why it is not held any more.
        """
        with self._lock:
            self._reason = reason or self._reason
            try:
                result = self._thaw()
            finally:
                if not self._owes_nothing:
                    self._owes_nothing = True
                    self._run_post()
            return result

    def part(self) -> str:
        """Let go of disks that are being detached, and wait until they are nobody's any more.

        Empty where nothing has changed until then: now it holds for good, see ``why_broken``. So it
        is when the power goes where the agent's own does not, as in the emulator's guests. Else why
        it does not; where no disk is being detached nothing has been done.
        """
        with self._lock:
            gone = next((why for disk in self._disks if (why := disk.device.why_gone())), "")
            if self.still is None or not gone:
                return self._reason
            self._reason = gone
            self._thaw()
            deadline = time.monotonic() + PARTING_SECONDS_MAX
            while self._are_mounted() or not all(disk.device.why_gone() for disk in self._disks):
                if changed := self._why_changed():
                    return changed
                if time.monotonic() > deadline:
                    return f"not all is detached and unmounted after {PARTING_SECONDS_MAX:g} s"
                time.sleep(STILL_PAUSE_SECONDS)
            changed = self._why_changed()
            self._is_over = not changed
            return changed

    def _thaw(self) -> FreezeResult | None:
        was_thawed, self._is_thawed = self._is_thawed, True
        return self._freezer.thaw() if self.is_frozen and not was_thawed else None

    def _are_mounted(self) -> bool:
        mounts = read_mounts()
        return any(mounts_on(disk.device.name, mounts) for disk in self._disks)

    def _why_over(self) -> str:
        gone = next((why for disk in self._disks if (why := disk.device.why_gone())), "")
        if gone:
            return gone
        if self.seconds >= self._seconds_max:
            return f"the time limit of {self._seconds_max:g} s has passed"
        return self._freezer.look() if self.is_frozen else ""

    def _why_written(self) -> str:
        if self.still is None:
            return ""
        try:
            for disk, then in zip(self._disks, self.still.counts, strict=True):
                if not stood_still(then, WriteCounts.of(disk.device)):
                    return f"{disk.shape.name} was written to after the final changeset"
        except CaptureError as error:
            return str(error)
        return ""

    def _why_changed(self) -> str:
        """As ``_why_written``, but a write that brought nothing new does not count.

        The kernel counts a write a little after its writer has heard that it is done, on a busy
        machine later than the freeze; and unmounting writes what is there already, also where a
        file system is cut off from its disk. Where no other block is marked than before, the marked
        ones are all that can differ.
        """
        written = self._why_written()
        if not written or self.still is None:
            return written
        try:
            counts = look([disk.device for disk in self._disks])
            if peek_running(self._disks) != self.still.marked:
                return written
            if digest_of(self._disks, self.still.marked) != self.still.digest:
                return written
            again = look([disk.device for disk in self._disks])
        except (CaptureError, StorageError, TrackingError) as error:
            return str(error)
        if not all(map(stood_still, counts, again)):
            return written
        self.still = replace(self.still, counts=counts)
        return ""


def digest_of(disks: Sequence[SourceDisk], blocks: BlockSets) -> bytes:
    """Of the content of those blocks now."""
    total = xxhash.xxh3_128()
    for disk in disks:
        for first, count in blocks[disk.index].runs():
            for at in range(first, first + count, DIGEST_BLOCKS):
                total.update(disk.read_blocks(at, min(DIGEST_BLOCKS, first + count - at)))
    return total.digest()


@dataclass
class FinalCapture(Capture):
    """A capture whose file systems stay frozen in ``held`` when it has gone well.

    Also when it has failed after the freeze: whoever runs it releases ``held`` then.

    seconds_max:   how long they may stay frozen.
    before_freeze: called last before anything is frozen.
    """

    seconds_max: float = 300.0
    before_freeze: Callable[[], None] = lambda: None
    held: FinalHold | None = None

    def _run_post(self) -> None:
        if self.held is None:
            super()._run_post()

    def _run_post_late(self) -> None:
        super()._run_post()

    def _take_point(self, downgraded: str = "") -> Taken:
        if self._scanning:
            raise FinalRefusedError(
                "changes are found by checksums here, which says nothing of an instant",
                hint='a final changeset needs tracker = "ebpf"',
            )
        mounts, unreachable = self._mounts()
        if unreachable:
            raise FinalRefusedError(unreachable)
        chunks, self._audit_chunk = sample(
            self.disks, self.state.position.audit_chunk, self.config.audit_chunks
        )
        self._audit = AuditSample(chunks)
        self._touched = {}
        last: BlockSets = {}
        for left in reversed(range(self.config.rounds_max)):
            sync_file_systems(mounts)
            last = self._absorb()
            if size_of(last) <= self.config.freeze_bytes_max or not left:
                break
            self._send_live(last)
            last = {}
        self._hold(mounts)
        return self._read_still(last, downgraded)

    def _hold(self, mounts: Sequence[str]) -> None:
        if self.aborted.is_set():
            raise CaptureError("the changeset was given up")
        self.before_freeze()
        if mounts:
            try:
                self.freezer.freeze(
                    mounts,
                    self.seconds_max,
                    freezing_seconds_max=min(FREEZING_SECONDS_MAX, self.seconds_max),
                )
            except CaptureError as error:
                raise FinalRefusedError(str(error)) from error
        self.held = FinalHold(
            self.disks,
            self.freezer,
            is_frozen=bool(mounts),
            seconds_max=self.seconds_max,
            run_post=self._run_post_late,
        )

    def _read_still(self, last: BlockSets, downgraded: str) -> Taken:
        """Send what is left, until nothing was written while that was read."""
        assert self.held is not None
        deadline = time.monotonic() + STILL_SECONDS_MAX
        while True:
            at_ns = self.clock_ns()
            counts = look([disk.device for disk in self.disks])
            peeked = peek_running(self.disks)
            wanted = union(last, peeked)
            self._send_live(wanted)
            self._audit.refresh(union(self._touched, wanted))
            digest = digest_of(self.disks, peeked)
            written = self._written_in_spite(peeked, counts)
            if not written and not any(count.under_way for count in counts):
                break
            if time.monotonic() > deadline:
                raise FinalRefusedError(
                    f"no instant at which all disks stood still within {STILL_SECONDS_MAX:g} s: "
                    f"{written or 'writes were under way all the time'}",
                    hint="end what writes to the disk past its file systems: swap, a database on "
                    "the raw disk",
                )
            time.sleep(STILL_PAUSE_SECONDS)
            last = self._absorb()
        self.held.still = Stillness(counts, peeked, digest)
        pause_ns = int(self.held.seconds * 1e9) if self.held.is_frozen else 0
        sent = union(self.state.todo, peeked)
        return self._end(self._promise, downgraded, sent, at_ns=at_ns, pause_ns=pause_ns)

"""A protected machine on real loop devices, its writers, and its replica in memory.

The writers keep an order on the disk that no torn state has: each record is written, made durable,
and only then is the next one begun. So an instant shows every record up to one number in its
place, and nothing of those after the next.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from agents.mobility.bookkeeping import begin_generation, finish, make_pending
from agents.mobility.capture import Capture, Taken
from agents.mobility.config import AppConsistencyConfig, CaptureConfig, DiskConfig
from agents.mobility.device import Device
from agents.mobility.frame_builder import FrameContent, SegmentBuilder
from agents.mobility.freeze import Freezer, FreezeResult, Frozen
from agents.mobility.source import SourceDisk
from agents.mobility.stream_state import Pending, StreamStateFile
from agents.mobility.tracker import Tracker
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.scan import ScanTracker
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Stamp
from replication.checksum import CHUNK_BYTES, block_digests, chunk_digest
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Watermark
from tests.agents.mobility.conftest import LoopDisk
from tests.agents.mobility.replica import Received, Replica

if TYPE_CHECKING:
    import uuid

    from agents.mobility.tracker import Tracker


MIB = 1 << 20
SIZES = {"ext4": 48 * MIB, "xfs": 320 * MIB}
SETTLING_CAPTURES_MAX = 5
QUICK = CaptureConfig(freeze_seconds_max=10, audit_chunks=16)

Mount = Callable[[LoopDisk, str], Path]
LookInto = Callable[[bytes | bytearray], contextlib.AbstractContextManager[Path]]


class Watched(SegmentBuilder):
    """A builder whose frames are seen as they come."""

    def __init__(self, real: SegmentBuilder, on_add: Callable[[FrameContent], None]) -> None:
        self._real, self._on_add = real, on_add

    def add(self, content: FrameContent) -> None:
        self._on_add(content)
        self._real.add(content)

    def finish(self) -> None:
        self._real.finish()


DURING_READS: list[Callable[[], None]] = []
"""What happens once while a disk is read."""


class InterferedDisk(SourceDisk):
    """A real disk that is written to while it is read."""

    __slots__ = ()

    def read_blocks(self, block: int, count: int) -> memoryview:
        data = super().read_blocks(block, count)
        while DURING_READS:
            DURING_READS.pop()()
        return data


class Machine:
    """A protected machine: disks, tracker, state, freezer; and its replica."""

    def __init__(self, machine: uuid.UUID, folder: Path, opened: contextlib.ExitStack) -> None:
        self.id, self.folder, self.opened = machine, folder, opened
        self.state = StreamStateFile(str(folder / "state"), machine)
        self.freezer = opened.enter_context(Freezer())
        self.disks: list[SourceDisk] = []
        self.config = QUICK
        self.received = Received()
        self.replica = Replica({})

    def protect(self, *disks: LoopDisk, scan: bool = False) -> None:
        for index, disk in enumerate(disks):
            device = Device.open(disk.path)
            self.opened.callback(device.close)
            tracker: Tracker
            if scan:
                tracker = ScanTracker.attach(device, f"{self.state.folder}/disk{index}.digests")
            else:
                tracker = EbpfTracker.attach(self.id, index, device)
            self.opened.callback(tracker.close)
            shape = DiskConfig(index=index, device=disk.path).shape(device.size_bytes)
            self.disks.append(InterferedDisk(shape, device, tracker))
        begin_generation(
            self.state,
            StreamState(Stamp(0, 0), NO_ATTEMPT, 0, 0, Watermark(self.id)),
            {disk.index: disk.block_count for disk in self.disks},
            {disk.index: disk.device.identity for disk in self.disks},
        )
        self.replica = Replica({disk.index: disk.shape.size_bytes for disk in self.disks})
        self.opened.callback(self.replica.close)

    def capture(
        self,
        *,
        app: AppConsistencyConfig | None = None,
        aborted: threading.Event | None = None,
        commit: bool = True,
        on_add: Callable[[FrameContent], None] | None = None,
    ) -> Taken:
        """Take a changeset, bring it to the replica, commit it."""
        builder, self.received = self.replica.builder()
        if on_add:
            builder = Watched(builder, on_add)
        taken = Capture(
            disks=self.disks,
            state=self.state,
            freezer=self.freezer,
            builder=builder,
            config=self.config,
            app=app,
            aborted=aborted or threading.Event(),
        ).run()
        builder.finish()
        if commit:
            self.received.apply(self.replica.images)
            number = self.state.position.committed + 1
            pending = Pending(Stamp(1, number), b"a" * 16, taken.whole)
            make_pending(self.state, pending, taken.sent, audit_chunk=taken.audit_chunk)
            finish(self.state)
        self.check_sent(taken)
        return taken

    def check_sent(self, taken: Taken) -> None:
        """The audit knows the blocks that were sent, and the note of them holds no other.

        What a changeset leaves out of its note, for it may be under way, is still to do.
        """
        for disk, blocks in taken.sent.items():
            noted = {at for first, count in blocks.runs() for at in range(first, first + count)}
            left_out = self.received.blocks(disk) - noted
            assert noted <= self.received.blocks(disk)
            still = self.state.todo[disk] | self._tracker(disk).peek()
            assert all(block in still for block in left_out)
        for found in taken.audit:
            start = found.chunk * CHUNK_BYTES
            chunk = self.replica.images[found.disk][start : start + CHUNK_BYTES]
            assert found.digest == chunk_digest(block_digests(chunk)), found

    def _tracker(self, index: int) -> Tracker:
        return next(disk.tracker for disk in self.disks if disk.index == index)

    def seed(self) -> None:
        while not self.capture().consistency.restorable:
            pass

    def loses_nothing(self) -> bool:
        """Whether what differs from the source is marked, and the next changesets carry it over.

        A file system writes by itself, for one as it is thawed: so a difference alone is no loss.
        """
        for _ in range(SETTLING_CAPTURES_MAX):
            differing = {disk.index: self._differing(disk) for disk in self.disks}
            for disk in self.disks:
                marked = self.state.todo[disk.index] | disk.tracker.peek()
                if not all(block in marked for block in differing[disk.index]):
                    return False
            if not any(differing.values()):
                return True
            self.capture()
        return False

    def _differing(self, disk: SourceDisk) -> list[int]:
        replica = memoryview(self.replica.images[disk.index])
        source = disk.read_blocks(0, disk.block_count)
        if replica == source:
            return []
        starts = range(0, len(replica), BLOCK_BYTES)
        return [
            start // BLOCK_BYTES
            for start in starts
            if replica[start : start + BLOCK_BYTES] != source[start : start + BLOCK_BYTES]
        ]


def mounter(tmp_path: Path, opened: contextlib.ExitStack) -> Mount:
    """Makes a file system on a disk and mounts it."""

    def make(disk: LoopDisk, kind: str) -> Path:
        point = tmp_path / f"mnt-{os.path.basename(disk.path)}"
        point.mkdir()
        command = ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"]
        command = command if kind == "ext4" else ["mkfs.xfs", "-q", "-f"]
        subprocess.run([*command, disk.path], check=True, capture_output=True)
        subprocess.run(["mount", disk.path, str(point)], check=True)
        opened.callback(subprocess.run, ["umount", "-l", str(point)], check=False)
        return point

    return make


def replica_mounter(tmp_path: Path) -> LookInto:
    """Mounts a replica as a machine that starts after a power cut would: its log is replayed."""

    @contextlib.contextmanager
    def mounted(image: bytes | bytearray) -> Iterator[Path]:
        path, point = tmp_path / "replica.img", tmp_path / "replica"
        path.write_bytes(image)
        point.mkdir(exist_ok=True)
        options = "loop,nouuid" if image[:4] == b"XFSB" else "loop"
        subprocess.run(["mount", "-o", options, str(path), str(point)], check=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)
            path.unlink()

    return mounted


class Worker:
    """A thread that does one step after another until the test ends."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self.count = 0
        self._step, self._stop = step, threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._step(self.count + 1)
                self.count += 1
        except OSError as error:
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()
        assert self._error is None

    def wait_for(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while self.count < count:
            assert time.monotonic() < deadline
            time.sleep(0.002)


RECORD_BYTES = 8192
RECORDS = 200


def file_writer(folders: list[Path]) -> Callable[[int], None]:
    """Records go round in one file in each folder, always one folder after the other."""
    fds = [os.open(folder / "records", os.O_RDWR | os.O_CREAT) for folder in folders]

    def step(number: int) -> None:
        for fd in fds:
            record = number.to_bytes(8, "big") * (RECORD_BYTES // 8)
            os.pwrite(fd, record, number % RECORDS * RECORD_BYTES)
            os.fdatasync(fd)

    return _closing(step, fds)


def last_record(path: Path) -> int:
    """The newest record of a file in which every earlier one is in its place."""
    data = path.read_bytes()
    found = {}
    for slot in range(len(data) // RECORD_BYTES):
        record = data[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
        found[slot] = {record[at : at + 8] for at in range(0, RECORD_BYTES, 8)}
    whole = {
        int.from_bytes(next(iter(numbers)), "big")
        for numbers in found.values()
        if len(numbers) == 1
    }
    newest = max(whole)
    for number in range(max(1, newest - RECORDS + 2), newest):
        assert number in whole, f"record {number} is not there, {newest} is"
    return newest


class Meddled(Freezer):
    """A real freezer; something happens before it freezes, or while it holds."""

    def __init__(self, real: Freezer) -> None:
        super().__init__()
        self._real = real
        self.before_freeze: Callable[[], object] = lambda: None
        self.while_frozen: Callable[[], object] = lambda: None
        self.thawed_at = 0.0

    def freeze(
        self,
        mount_points: Sequence[str],
        seconds_max: float,
        *,
        freezing_seconds_max: float | None = None,
    ) -> Frozen:
        self.before_freeze()
        frozen = self._real.freeze(
            mount_points, seconds_max, freezing_seconds_max=freezing_seconds_max
        )
        self.while_frozen()
        return frozen

    def thaw(self) -> FreezeResult:
        result = self._real.thaw()
        self.thawed_at = time.monotonic()
        return result


def unrest(point: Path) -> Callable[[FrameContent], None]:
    """A change now, and another one as soon as that is read: the capture has to freeze."""

    def write() -> None:
        with open(point / "unrest", "wb") as file:
            file.write(os.urandom(9000))
            file.flush()
            os.fsync(file.fileno())

    write()
    left = [write]
    return lambda _content: left.pop()() if left else None


def replace_config(**changes: Any) -> CaptureConfig:
    return QUICK.model_copy(update=changes)


RAW_BYTES = 32 << 20


def raw_writer(disk: LoopDisk, first: int, count: int = 2) -> Callable[[int], None]:
    """The same few blocks over and over, one after the other: all are marked all the time."""
    fd = os.open(disk.path, os.O_RDWR | os.O_DIRECT)
    page = mmap.mmap(-1, BLOCK_BYTES)

    def step(number: int) -> None:
        page[:8] = number.to_bytes(8, "big")
        for block in range(first, first + count):
            os.pwrite(fd, page, block * BLOCK_BYTES)
        time.sleep(0.0005)

    return _closing(step, [fd])


def _closing(step: Callable[[int], None], fds: Sequence[int]) -> Callable[[int], None]:
    """Close the files with the last user of ``step``: open ones keep mounts and loop devices."""
    for fd in fds:
        weakref.finalize(step, os.close, fd)
    return step


def raw_numbers(image: bytes | bytearray, first: int, count: int = 2) -> list[int]:
    return [
        int.from_bytes(image[block * BLOCK_BYTES :][:8], "big")
        for block in range(first, first + count)
    ]

"""Captures of real disks under real writers: what a point promises is what the replica holds.

The writers keep an order on the disk that no torn state has: each record is written, made durable,
and only then is the next one begun. So an instant shows every record up to one number in its
place, and nothing of those after the next.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import stat
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from agents.mobility.app_scripts import check_scripts
from agents.mobility.bookkeeping import begin_generation, finish, make_pending
from agents.mobility.capture import Capture, Taken
from agents.mobility.config import AppConsistencyConfig, CaptureConfig, DiskConfig
from agents.mobility.device import Device
from agents.mobility.frame_builder import FrameContent, SegmentBuilder
from agents.mobility.freeze import Freezer, FreezeResult, Frozen
from agents.mobility.source import SourceDisk
from agents.mobility.stream_state import Pending, StreamStateFile
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.scan import ScanTracker
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Consistency, Stamp
from replication.checksum import CHUNK_BYTES, block_digests, chunk_digest
from replication.errors import CaptureError, StorageError
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Watermark
from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk
from tests.agents.mobility.replica import Received, Replica

if TYPE_CHECKING:
    from agents.mobility.tracker import Tracker

MIB = 1 << 20
SIZES = {"ext4": 48 * MIB, "xfs": 320 * MIB}
QUICK = CaptureConfig(freeze_seconds_max=10, audit_chunks=16)


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
        """The audit knows the blocks that were sent, and the note of them holds no other."""
        for disk, blocks in taken.sent.items():
            noted = {at for first, count in blocks.runs() for at in range(first, first + count)}
            assert noted == self.received.blocks(disk)
        for found in taken.audit:
            start = found.chunk * CHUNK_BYTES
            chunk = self.replica.images[found.disk][start : start + CHUNK_BYTES]
            assert found.digest == chunk_digest(block_digests(chunk)), found

    def seed(self) -> None:
        while not self.capture().consistency.restorable:
            pass

    def equals_source(self) -> bool:
        return all(
            self.replica.images[disk.index] == disk.read_blocks(0, disk.block_count)
            for disk in self.disks
        )


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


Mount = Callable[[LoopDisk, str], Path]
LookInto = Callable[[bytes | bytearray], contextlib.AbstractContextManager[Path]]


@pytest.fixture
def mount(tmp_path: Path, opened: contextlib.ExitStack) -> Mount:
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


@pytest.fixture
def look_into(tmp_path: Path) -> LookInto:
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

    return step


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


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_points_of_a_busy_file_system_are_instants(
    kind: str, source: Machine, loop_disk: MakeLoopDisk, mount: Mount, look_into: LookInto
) -> None:
    disk = loop_disk(SIZES[kind])
    point = mount(disk, kind)
    source.protect(disk)
    seen = []
    with Worker(file_writer([point])) as writer:
        writer.wait_for(3)
        for _ in range(2 if kind == "xfs" else 4):
            before = writer.count
            taken = source.capture()
            after = writer.count
            assert (taken.consistency, taken.reason) == (Consistency.CRASH, "")
            assert taken.pause_ns > 0
            assert taken.captured_ns <= taken.time_ns
            with look_into(source.replica.images[0]) as replica:
                seen.append(last_record(replica / "records"))
                assert before <= seen[-1] <= after + 1
            writer.wait_for(after + 5)
    assert seen == sorted(set(seen))
    source.capture()
    assert source.equals_source()


def test_points_of_two_disks_are_one_instant(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, look_into: LookInto
) -> None:
    disks = [loop_disk(SIZES["ext4"]), loop_disk(SIZES["ext4"])]
    points = [mount(disk, "ext4") for disk in disks]
    source.protect(*disks)
    with Worker(file_writer(points)) as writer:
        writer.wait_for(3)
        for _ in range(4):
            assert source.capture().consistency is Consistency.CRASH
            newest = []
            for index in (0, 1):
                with look_into(source.replica.images[index]) as replica:
                    newest.append(last_record(replica / "records"))
            assert newest[0] - newest[1] in (0, 1)
            writer.wait_for(writer.count + 3)


def test_idle_machine_is_never_frozen(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    (point / "file").write_bytes(b"content" * 1000)
    os.sync()
    for _ in range(3):
        taken = source.capture()
    assert taken.consistency is Consistency.CRASH
    assert taken.pause_ns == 0
    assert not source.received.extents
    assert len(taken.audit) == QUICK.audit_chunks
    assert source.equals_source()


def test_backlog_is_cut_into_parts_until_none_is_left(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(160 * MIB)
    noise = os.urandom(MIB)
    with open(disk.path, "r+b") as file:
        for at in (0, 5, 6, 7, 30, *range(60, 80), 100, 101, 120, 159):
            os.pwrite(file.fileno(), noise, at * MIB)
        os.fsync(file.fileno())
    source.config = CaptureConfig(changeset_bytes_max=16 * MIB)
    source.protect(disk)
    reasons = []
    changed = False
    while not source.state.position.seeded:
        taken = source.capture()
        reasons.append((taken.consistency, taken.whole, taken.reason))
        if not changed:
            changed = True
            disk.write([0, 61 * 256, 159 * 256, 90 * 256], b"n")
    assert len(reasons) == 2
    assert reasons[0] == (Consistency.NONE, False, "initial replication is under way")
    assert reasons[-1] == (Consistency.CRASH, True, "")
    assert not any(source.state.todo.values())
    assert source.equals_source()


def test_capture_that_was_killed_at_any_point_is_taken_anew_without_loss(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 * MIB)
    source.protect(disk)
    source.seed()
    for blocks in ([1, 2, 3], [3, 4], [5]):
        disk.write(blocks, os.urandom(1))
        source.capture(commit=False)  # as if the agent died before its commit
        source.state = StreamStateFile(str(source.folder / "state"), source.id)
    source.capture()
    assert source.received.blocks(0) == {1, 2, 3, 4, 5}
    assert source.equals_source()


def test_no_capture_begins_while_a_commit_is_pending(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 * MIB)
    source.protect(disk)
    source.seed()
    disk.write([7])
    taken = source.capture(commit=False)
    pending = Pending(Stamp(1, 2), b"a" * 16, whole=True)
    make_pending(source.state, pending, taken.sent, audit_chunk=0)
    disk.write([7], b"y")
    with pytest.raises(AssertionError, match="settled first"):
        source.capture()
    finish(source.state)
    source.capture()
    assert source.received.blocks(0) == {7}


def test_freeze_that_fails_gives_no_point(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    source.freezer = Meddled(source.freezer)
    with Freezer() as other:
        source.freezer.before_freeze = lambda: other.freeze([str(point)], 20)
        taken = source.capture(on_add=unrest(point))
        other.thaw()
    source.freezer.before_freeze = lambda: None
    assert taken.consistency is Consistency.NONE
    assert "frozen already" in taken.reason
    assert not taken.audit
    source.capture()
    assert source.equals_source()


class Meddled(Freezer):
    """A real freezer; something happens before it freezes, or while it holds."""

    def __init__(self, real: Freezer) -> None:
        super().__init__()
        self._real = real
        self.before_freeze: Callable[[], object] = lambda: None
        self.while_frozen: Callable[[], object] = lambda: None
        self.thawed_at = 0.0

    def freeze(self, mount_points: Sequence[str], seconds_max: float) -> Frozen:
        self.before_freeze()
        frozen = self._real.freeze(mount_points, seconds_max)
        self.while_frozen()
        return frozen

    def thaw(self) -> FreezeResult:
        result = self._real.thaw()
        self.thawed_at = time.monotonic()
        return result


def test_freeze_that_ends_early_gives_no_point(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    source.config = replace_config(freeze_seconds_max=0.2)
    source.freezer = Meddled(source.freezer)
    with Worker(file_writer([point])) as writer:
        writer.wait_for(3)
        source.freezer.while_frozen = lambda: time.sleep(0.6)
        taken = source.capture()
        assert taken.consistency is Consistency.NONE
        assert "time limit" in taken.reason
        assert not taken.audit
    source.freezer.while_frozen = lambda: None
    source.capture()
    assert source.equals_source()


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

    return step


def raw_numbers(image: bytes | bytearray, first: int, count: int = 2) -> list[int]:
    return [
        int.from_bytes(image[block * BLOCK_BYTES :][:8], "big")
        for block in range(first, first + count)
    ]


def test_raw_disk_has_points_when_it_is_quiet_and_says_so_when_it_is_not(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 << 20)
    source.protect(disk)
    with Worker(raw_writer(disk, 100)) as writer:
        writer.wait_for(3)
        taken = source.capture()
        assert taken.consistency is Consistency.NONE
        assert "written to all the time" in taken.reason
    taken = source.capture()
    assert taken.consistency is Consistency.CRASH
    assert taken.pause_ns == 0
    assert source.equals_source()


def test_writes_beside_a_frozen_file_system_to_blocks_already_marked_are_noticed(
    source: Machine, loop_disk: MakeLoopDisk, tmp_path: Path
) -> None:
    """As swap or a database on another partition of the disk does; the bits show nothing of it."""
    disk = loop_disk(RAW_BYTES + (16 << 20))
    command = ["mkfs.ext4", "-q", "-F", "-b", "4096", disk.path, str(RAW_BYTES // BLOCK_BYTES)]
    subprocess.run(command, check=True, capture_output=True)
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mount", disk.path, str(point)], check=True)
    source.opened.callback(subprocess.run, ["umount", "-l", str(point)], check=False)
    source.protect(disk)
    source.seed()
    beside = RAW_BYTES // BLOCK_BYTES + 5
    source.freezer = Meddled(source.freezer)

    def write_while_it_is_read() -> None:
        disk.write([beside], b"1")  # marked from now on
        DURING_READS.append(lambda: disk.write([beside], b"2"))

    source.freezer.while_frozen = write_while_it_is_read
    try:
        taken = source.capture(on_add=unrest(point))
    finally:
        DURING_READS.clear()
    assert taken.consistency is Consistency.NONE
    assert "was written to while" in taken.reason
    # What stands still while it is read does no harm, whenever it was written.
    source.freezer.while_frozen = lambda: disk.write([beside], b"3")
    assert source.capture(on_add=unrest(point)).consistency is Consistency.CRASH
    assert source.replica.images[0][beside * BLOCK_BYTES] == ord("3")
    source.freezer.while_frozen = lambda: None
    source.capture()
    assert source.equals_source()


def test_file_system_that_is_mounted_after_the_look_is_not_taken_for_frozen(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disks = [loop_disk(SIZES["ext4"]), loop_disk(SIZES["ext4"])]
    points = [mount(disk, "ext4") for disk in disks]
    source.protect(*disks)
    source.seed()
    subprocess.run(["umount", str(points[1])], check=True)
    source.freezer = Meddled(source.freezer)

    def mount_again() -> None:
        subprocess.run(["mount", disks[1].path, str(points[1])], check=True)

    def write_to_it() -> None:
        step = file_writer([points[1]])
        for number in range(3):
            step(number)

    source.freezer.before_freeze = mount_again
    source.freezer.while_frozen = write_to_it
    taken = source.capture(on_add=unrest(points[0]))
    assert points[1].is_mount()
    # Whether those writes came before or after the look at the counters, the point is an instant.
    if taken.consistency is Consistency.CRASH:
        assert source.replica.images[1] == source.disks[1].read_blocks(
            0, source.disks[1].block_count
        )
    source.freezer.before_freeze = source.freezer.while_frozen = lambda: None
    source.capture()
    assert source.equals_source()


def test_file_system_that_went_away_before_the_freeze_gives_no_point(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    source.freezer = Meddled(source.freezer)
    source.freezer.before_freeze = lambda: subprocess.run(["umount", str(point)], check=True)
    taken = source.capture(on_add=unrest(point))
    assert taken.consistency is Consistency.NONE
    assert "nothing is mounted there" in taken.reason
    source.freezer.before_freeze = lambda: None
    assert source.capture().consistency is Consistency.CRASH
    assert source.equals_source()


def test_covered_mount_costs_the_point_and_not_the_replication(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    fd = os.open(point / "file", os.O_RDWR | os.O_CREAT)
    source.opened.callback(os.close, fd)

    def write(_content: FrameContent | None = None) -> None:
        os.pwrite(fd, os.urandom(9000), 0)
        os.fsync(fd)

    write()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    try:
        taken = source.capture(on_add=write)
    finally:
        subprocess.run(["umount", str(point)], check=True)
    assert taken.consistency is Consistency.NONE
    assert "covered by another mount" in taken.reason
    assert source.received.extents
    assert source.capture().consistency is Consistency.CRASH
    assert source.equals_source()


def test_file_system_mounted_twice_is_frozen_once(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, tmp_path: Path
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    for number, options in enumerate(("bind", "bind,ro")):
        other = tmp_path / f"again{number}"
        other.mkdir()
        subprocess.run(["mount", "-o", options, str(point), str(other)], check=True)
        source.opened.callback(subprocess.run, ["umount", "-l", str(other)], check=False)
    source.protect(disk)
    assert len(source.disks[0].file_systems()) == 1
    taken = source.capture(on_add=unrest(point))
    assert taken.consistency is Consistency.CRASH
    assert taken.pause_ns > 0
    source.capture()
    assert source.equals_source()


def test_read_only_file_system_needs_no_freeze(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    source.protect(disk)
    assert source.disks[0].file_systems() == []
    taken = source.capture()
    assert (taken.consistency, taken.pause_ns) == (Consistency.CRASH, 0)
    assert source.equals_source()


def test_busy_raw_disk_has_points_by_clones_of_its_image(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, opened: contextlib.ExitStack
) -> None:
    store = mount(loop_disk(SIZES["xfs"]), "xfs")
    disk = LoopDisk(store / "disk.img", 8 << 20)
    opened.callback(disk.detach)
    source.config = replace_config(raw_capture="reflink", rounds_max=2)
    source.protect(disk)
    with Worker(raw_writer(disk, 100, 40)) as writer:
        writer.wait_for(3)
        newest = 0
        for _ in range(5):
            before = writer.count
            taken = source.capture()
            assert (taken.consistency, taken.reason) == (Consistency.CRASH, "")
            assert taken.audit == ()
            numbers = raw_numbers(source.replica.images[0], 100, 40)
            assert numbers == sorted(numbers, reverse=True)
            assert numbers[0] - numbers[-1] in (0, 1)
            assert numbers[-1] >= before > newest
            newest = before
            writer.wait_for(writer.count + 3)
    assert os.listdir(store) == ["disk.img"]
    source.capture()
    assert source.equals_source()


def test_image_that_cannot_be_cloned_costs_the_point(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 << 20)
    source.config = replace_config(raw_capture="reflink")
    source.protect(disk)
    with Worker(raw_writer(disk, 100)) as writer:
        writer.wait_for(3)
        os.rename(disk.image, f"{disk.image}.old")
        disk.image.write_bytes(b"")
        taken = source.capture()
    assert taken.consistency is Consistency.NONE
    assert "cloned" in taken.reason or "no longer the image" in taken.reason
    os.rename(f"{disk.image}.old", disk.image)


def test_scan_gives_points_of_a_quiet_disk_alone(source: Machine, loop_disk: MakeLoopDisk) -> None:
    disk = loop_disk(4 << 20)
    disk.write([3, 9])
    source.protect(disk, scan=True)
    first = source.capture()
    assert first.consistency is Consistency.CRASH
    disk.write([5], b"z")
    with Worker(raw_writer(disk, 100)) as writer:
        writer.wait_for(3)
        assert source.capture().consistency is Consistency.NONE
    assert source.capture().consistency is Consistency.CRASH
    assert source.equals_source()


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def scripts(folder: Path, *, pre: str = "exit 0") -> AppConsistencyConfig:
    made = AppConsistencyConfig(
        pre=(script(folder, "pre", f"echo pre >> {folder}/told; {pre}"),),
        post=(script(folder, "post", f"echo post $(date +%s%N) >> {folder}/told"),),
        script_seconds_max=5,
    )
    check_scripts((*made.pre, *made.post))
    return made


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """Where nobody but root could have put a script."""
    folder = Path("/root") / f"scripts-{uuid.uuid4()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("ok", [True, False])
def test_scripts_decide_about_app_consistency(
    ok: bool, source: Machine, loop_disk: MakeLoopDisk, mount: Mount, own_folder: Path
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    (point / "file").write_bytes(b"x" * 9000)
    source.freezer = Meddled(source.freezer)
    app = scripts(own_folder, pre="exit 0" if ok else "echo busy; exit 3")
    taken = source.capture(app=app)
    told = (own_folder / "told").read_text().split()
    assert told[:2] == ["pre", "post"]
    assert len(told) == 3
    assert taken.pause_ns > 0
    if ok:
        assert (taken.consistency, taken.reason) == (Consistency.APP, "")
    else:
        assert taken.consistency is Consistency.CRASH
        assert "exit code 3: busy" in taken.reason
    source.capture()
    assert source.equals_source()


def test_applications_go_on_as_soon_as_the_file_systems_do(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, own_folder: Path
) -> None:
    """Also when the freeze fails, and though sending what is left takes its time."""
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    app = scripts(own_folder)
    source.freezer = Meddled(source.freezer)
    slow: list[int] = []

    def when_sending(content: FrameContent) -> None:
        if (own_folder / "told").exists() and "post" in (own_folder / "told").read_text():
            slow.append(len(content.extents))

    for fails in (False, True):
        (own_folder / "told").unlink(missing_ok=True)
        slow.clear()
        (point / "file").write_bytes(os.urandom(90_000))
        if fails:
            source.freezer.before_freeze = lambda: (_ for _ in ()).throw(CaptureError("no"))
        taken = source.capture(app=app, on_add=when_sending)
        assert taken.consistency is (Consistency.NONE if fails else Consistency.APP)
        assert slow, "what was frozen is sent after the applications go on"
        assert (own_folder / "told").read_text().count("post") == 1


@pytest.mark.parametrize("when", ["at once", "in scripts", "frozen"])
def test_capture_that_is_given_up_ends_and_thaws(
    when: str, source: Machine, loop_disk: MakeLoopDisk, mount: Mount, own_folder: Path
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    (point / "file").write_bytes(b"x" * 90_000)
    os.sync()
    aborted = threading.Event()
    source.freezer = Meddled(source.freezer)
    app = scripts(own_folder)
    if when == "at once":
        aborted.set()
    elif when == "in scripts":
        threading.Timer(0.3, aborted.set).start()
        app = scripts(own_folder, pre="sleep 0.6")
    else:
        source.freezer.while_frozen = lambda: (_ for _ in ()).throw(StorageError("a bad sector"))
    with pytest.raises(StorageError if when == "frozen" else CaptureError):
        source.capture(app=app, aborted=aborted)
    told = (own_folder / "told").read_text() if when != "at once" else ""
    assert told.count("pre") == told.count("post") == (0 if when == "at once" else 1)
    source.freezer.while_frozen = lambda: None
    if when == "frozen":
        source.freezer.thaw()
    (point / "other").write_bytes(b"y")
    source.capture()
    assert source.received.blocks(0)
    source.capture()
    assert source.equals_source()


def test_change_behind_the_trackers_back_shows_in_the_audit(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(1 << 20)
    disk.write(range(0, 256, 3), b"d")
    source.protect(disk)
    source.seed()
    with open(disk.image, "r+b") as image:
        image.seek(37 * BLOCK_BYTES)
        image.write(b"rot")
    differing = []
    for _ in range(2):
        builder, _received = source.replica.builder()
        taken = Capture(source.disks, source.state, source.freezer, builder, source.config).run()
        for found in taken.audit:
            start = found.chunk * CHUNK_BYTES
            chunk = source.replica.images[0][start : start + CHUNK_BYTES]
            if found.digest != chunk_digest(block_digests(chunk)):
                differing.append(found.chunk)
    assert differing == [37 // 16] * 2


def test_audit_walks_over_all_disks_in_turn(source: Machine, loop_disk: MakeLoopDisk) -> None:
    disks = [loop_disk(5 * CHUNK_BYTES), loop_disk(3 * CHUNK_BYTES + 512)]
    source.protect(*disks)
    source.config = replace_config(audit_chunks=4)
    seen = []
    for _ in range(5):
        seen += [(found.disk, found.chunk) for found in source.capture().audit]
    every = [*((0, chunk) for chunk in range(5)), *((1, chunk) for chunk in range(4))]
    assert seen == (every * 3)[:20]


def test_clock_that_is_set_back_during_a_capture_does_not_turn_time_around(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    source.protect(loop_disk(1 << 20))
    times = iter([10**18, *range(10**17, 10**17 + 1000)])
    builder, _ = source.replica.builder()
    taken = Capture(
        source.disks,
        source.state,
        source.freezer,
        builder,
        source.config,
        clock_ns=lambda: next(times),
    ).run()
    assert taken.captured_ns == taken.time_ns == 10**18

"""The tracker in the kernel, on real loop devices."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import struct
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from agents.mobility.tracker import libbpf, pins, reason_untrackable
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.pins import remove_machine
from replication.block_set import BLOCK_BYTES, BlockSet
from replication.errors import TrackingError

if TYPE_CHECKING:
    import contextlib
    import uuid
    from collections.abc import Iterable

    from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk, OpenDevice

MIB = 1 << 20
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F


def set_of(block_count: int, blocks: Iterable[int]) -> BlockSet:
    made = BlockSet(block_count)
    for block in blocks:
        made.add_run(block, 1)
    return made


def range_ioctl(path: str, request: int, offset_bytes: int, length_bytes: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.ioctl(fd, request, struct.pack("<QQ", offset_bytes, length_bytes))
    finally:
        os.close(fd)


@pytest.fixture
def disk(loop_disk: MakeLoopDisk) -> LoopDisk:
    return loop_disk(64 * MIB)


@pytest.fixture
def tracker(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice, opened: contextlib.ExitStack
) -> EbpfTracker:
    made = EbpfTracker.attach(machine, 0, open_device(disk.path))
    opened.callback(made.close)
    return made


def test_exactly_the_written_blocks_are_marked(disk: LoopDisk, tracker: EbpfTracker) -> None:
    count = 64 * MIB // BLOCK_BYTES
    blocks = random.Random(1).sample(range(count), 777)
    disk.write(blocks)
    assert tracker.peek() == set_of(count, blocks)
    assert tracker.peek_running() == set_of(count, blocks)
    assert tracker.swap() == set_of(count, blocks)
    assert not tracker.peek_running()
    assert tracker.peek() == set_of(count, blocks)
    tracker.forget()
    assert not tracker.peek()
    assert not tracker.swap()


def test_a_write_of_sectors_marks_every_block_it_touches(
    disk: LoopDisk, tracker: EbpfTracker
) -> None:
    fd = os.open(disk.path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 3 * BLOCK_BYTES) as pages:
            os.preadv(fd, [pages], 0)
            with memoryview(pages) as view, view[: BLOCK_BYTES + 512] as part:
                os.pwrite(fd, part, 64 * BLOCK_BYTES - 512)
            with memoryview(pages) as view, view[:512] as part:
                os.pwrite(fd, part, 100 * BLOCK_BYTES + 1024)
    finally:
        os.close(fd)
    assert tracker.swap() == set_of(64 * MIB // BLOCK_BYTES, [63, 64, 100])


@pytest.mark.parametrize("request_", [BLKDISCARD, BLKZEROOUT])
def test_a_discard_and_a_zeroing_mark_their_whole_range(
    disk: LoopDisk, tracker: EbpfTracker, request_: int
) -> None:
    range_ioctl(disk.path, request_, 5 * BLOCK_BYTES, 9000 * BLOCK_BYTES)
    range_ioctl(disk.path, request_, 63 * MIB, MIB)
    expected = BlockSet(64 * MIB // BLOCK_BYTES)
    expected.add_run(5, 9000)
    expected.add_run(63 * 256, 256)
    assert tracker.swap() == expected


def test_reads_and_flushes_mark_nothing(disk: LoopDisk, tracker: EbpfTracker) -> None:
    fd = os.open(disk.path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, MIB) as pages:
            for offset in range(0, 64 * MIB, MIB):
                os.preadv(fd, [pages], offset)
        for _ in range(5):
            os.fsync(fd)
    finally:
        os.close(fd)
    assert not tracker.peek()
    disk.write([3])  # it does watch
    assert tracker.swap() == set_of(64 * MIB // BLOCK_BYTES, [3])


def test_a_flushing_write_is_marked(disk: LoopDisk, tracker: EbpfTracker) -> None:
    fd = os.open(disk.path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as page:
            os.pwrite(fd, page, 7 * BLOCK_BYTES)
    finally:
        os.close(fd)
    assert tracker.swap() == set_of(64 * MIB // BLOCK_BYTES, [7])


def test_no_write_is_lost_while_epochs_switch(disk: LoopDisk, tracker: EbpfTracker) -> None:
    count = 64 * MIB // BLOCK_BYTES
    halves = [random.Random(n).sample(range(n, count, 2), 4000) for n in range(2)]
    writers = [threading.Thread(target=disk.write, args=(half,)) for half in halves]
    for writer in writers:
        writer.start()
    found = BlockSet(count)
    epochs = 0
    while any(writer.is_alive() for writer in writers):
        found |= tracker.swap()
        tracker.forget()
        epochs += 1
    found |= tracker.swap()
    assert epochs > 1
    assert found == set_of(count, halves[0] + halves[1])


def test_a_swap_without_forget_repeats_and_never_drops(
    disk: LoopDisk, tracker: EbpfTracker
) -> None:
    count = 64 * MIB // BLOCK_BYTES
    disk.write([1])
    assert tracker.swap() == set_of(count, [1])
    disk.write([2])
    assert tracker.swap() == set_of(count, [1, 2])
    disk.write([3])
    assert tracker.peek() == set_of(count, [1, 2, 3])
    tracker.forget()
    assert set_of(count, [3]) - tracker.swap() == BlockSet(count)
    tracker.forget()
    assert not tracker.swap()


def test_forget_without_swap_is_refused(tracker: EbpfTracker) -> None:
    with pytest.raises(AssertionError):
        tracker.forget()


def test_a_closed_tracker_goes_on_in_the_kernel(
    machine: uuid.UUID,
    disk: LoopDisk,
    open_device: OpenDevice,
    opened: contextlib.ExitStack,
) -> None:
    device = open_device(disk.path)
    first = EbpfTracker.attach(machine, 0, device)
    assert first.fresh
    disk.write([1])
    first.swap()
    first.forget()
    disk.write([2])
    first.swap()  # not forgotten
    first.close()
    disk.write([3])
    second = EbpfTracker.attach(machine, 0, device)
    opened.callback(second.close)
    assert not second.fresh
    assert second.swap() == set_of(device.block_count, [2, 3])


def test_fresh_is_told_until_the_first_forget(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice
) -> None:
    device = open_device(disk.path)
    for _ in range(2):
        tracker = EbpfTracker.attach(machine, 0, device)
        assert tracker.fresh
        tracker.swap()
        tracker.close()
    tracker = EbpfTracker.attach(machine, 0, device)
    tracker.swap()
    tracker.forget()
    assert not tracker.fresh
    tracker.close()
    tracker = EbpfTracker.attach(machine, 0, device)
    assert not tracker.fresh
    tracker.close()


def test_a_resized_disk_is_tracked_anew(
    machine: uuid.UUID, loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(8 * MIB)
    tracker = EbpfTracker.attach(machine, 0, open_device(disk.path))
    tracker.swap()
    tracker.forget()
    os.truncate(disk.image, 8 * MIB + BLOCK_BYTES)
    subprocess.run(["losetup", "-c", disk.path], check=True)
    tracker.close()
    grown = open_device(disk.path)
    assert grown.block_count == 2049
    tracker = EbpfTracker.attach(machine, 0, grown)
    assert tracker.fresh
    disk.write([2048])
    assert tracker.swap() == set_of(2049, [2048])
    tracker.close()


@pytest.mark.parametrize("block", [2049, 2051, 4000])
def test_a_write_past_the_known_end_is_told(
    machine: uuid.UUID, loop_disk: MakeLoopDisk, open_device: OpenDevice, block: int
) -> None:
    disk = loop_disk(8 * MIB + BLOCK_BYTES)
    device = open_device(disk.path)
    tracker = EbpfTracker.attach(machine, 0, device)
    tracker.swap()
    tracker.forget()
    os.truncate(disk.image, 32 * MIB)
    subprocess.run(["losetup", "-c", disk.path], check=True)
    assert device.size_now_bytes() == 32 * MIB
    assert not tracker.swap()
    disk.write([block])
    for ask in (tracker.peek, tracker.peek_running, tracker.swap):
        with pytest.raises(TrackingError, match="missed"):
            ask()
    tracker.close()
    again = EbpfTracker.attach(machine, 0, device)  # the same size as before, yet lost
    assert again.fresh
    again.close()


def test_a_disk_that_is_another_device_now_is_tracked_anew(
    machine: uuid.UUID, loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disks = [loop_disk(8 * MIB) for _ in range(2)]
    first, second = (open_device(disk.path) for disk in disks)
    tracker = EbpfTracker.attach(machine, 0, first)
    tracker.swap()
    tracker.forget()
    tracker.close()
    tracker = EbpfTracker.attach(machine, 0, second)
    assert tracker.fresh
    disks[0].write([1])
    disks[1].write([2])
    assert tracker.swap() == set_of(first.block_count, [2])
    tracker.close()


def test_another_image_under_the_same_device_is_tracked_anew(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice
) -> None:
    device = open_device(disk.path)
    tracker = EbpfTracker.attach(machine, 0, device)
    tracker.swap()
    tracker.forget()
    tracker.close()
    device.close()
    disk.detach()
    subprocess.run(["losetup", disk.path, disk.image], check=True)
    again = EbpfTracker.attach(machine, 0, open_device(disk.path))
    assert again.fresh
    again.close()


def test_two_disks_are_apart_and_swap_in_parallel(
    machine: uuid.UUID, loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disks = [loop_disk(16 * MIB), loop_disk(32 * MIB)]
    trackers = [
        EbpfTracker.attach(machine, index, open_device(disk.path))
        for index, disk in enumerate(disks)
    ]
    counts = [4096, 8192]
    blocks = [random.Random(n).sample(range(counts[n]), 1500) for n in range(2)]
    found = [BlockSet(count) for count in counts]

    def swap_often(index: int) -> None:
        for _ in range(20):
            found[index] |= trackers[index].swap()
            trackers[index].forget()

    threads = [threading.Thread(target=swap_often, args=(n,)) for n in range(2)]
    threads += [threading.Thread(target=disks[n].write, args=(blocks[n],)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, tracker in enumerate(trackers):
        found[index] |= tracker.swap()
        assert found[index] == set_of(counts[index], blocks[index])
    trackers[0].remove()
    disks[1].write([5])
    trackers[1].forget()
    assert trackers[1].swap() == set_of(counts[1], [5])
    trackers[1].remove()


def test_remove_leaves_nothing(machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice) -> None:
    tracker = EbpfTracker.attach(machine, 0, open_device(disk.path))
    assert os.path.isdir(f"{pins.ROOT}/{machine}")
    tracker.remove()
    assert not os.path.exists(f"{pins.ROOT}/{machine}")
    remove_machine(machine)  # fine when there is nothing


@pytest.mark.parametrize("missing", ["complete2", "issue0", "lost", "disks", "0/a", "0/b"])
def test_half_made_pins_are_made_anew(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice, missing: str
) -> None:
    device = open_device(disk.path)
    tracker = EbpfTracker.attach(machine, 0, device)
    tracker.swap()
    tracker.forget()
    tracker.close()
    os.unlink(f"{pins.ROOT}/{machine}/{missing}")
    again = EbpfTracker.attach(machine, 0, device)
    assert again.fresh
    disk.write([9])
    assert again.swap() == set_of(device.block_count, [9])
    again.remove()
    assert not os.path.exists(f"{pins.ROOT}/{machine}")


def test_pins_that_are_not_yet_named_in_disks_are_made_anew(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice
) -> None:
    device = open_device(disk.path)
    EbpfTracker.attach(machine, 0, device).close()
    disks = libbpf.pinned(f"{pins.ROOT}/{machine}/disks")
    try:
        libbpf.delete(disks, device.dev)
        assert libbpf.keys(disks) == []
    finally:
        os.close(disks)
    again = EbpfTracker.attach(machine, 0, device)
    assert again.fresh
    again.close()


def test_pins_removed_below_a_tracker_are_told(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice
) -> None:
    tracker = EbpfTracker.attach(machine, 0, open_device(disk.path))
    remove_machine(machine)
    with pytest.raises(TrackingError, match="no longer track"):
        tracker.swap()
    tracker.close()


def test_loop_devices_can_be_tracked(disk: LoopDisk, open_device: OpenDevice) -> None:
    assert reason_untrackable(open_device(disk.path)) is None


def test_a_device_that_completes_no_requests_is_refused(open_device: OpenDevice) -> None:
    if not os.path.exists("/sys/class/zram-control"):
        subprocess.run(["modprobe", "zram"], check=True)
    with open("/sys/class/zram-control/hot_add") as file:
        number = file.read().strip()
    try:
        with open(f"/sys/block/zram{number}/disksize", "w") as file:
            file.write(str(4 * MIB))
        if not os.path.exists(f"/dev/zram{number}"):
            with open(f"/sys/block/zram{number}/dev") as file:
                major, minor = map(int, file.read().split(":"))
            os.mknod(f"/dev/zram{number}", 0o60600, os.makedev(major, minor))
        device = open_device(f"/dev/zram{number}")
        reason = reason_untrackable(device)
        device.close()
        assert reason is not None
        assert "completes no requests" in reason
    finally:
        with open("/sys/class/zram-control/hot_remove", "w") as file:
            file.write(number)
        if os.path.exists(f"/dev/zram{number}"):
            os.unlink(f"/dev/zram{number}")

"""Changes found by digests, on real loop devices."""

from __future__ import annotations

import fcntl
import os
import random
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agents.mobility.tracker.scan import ScanTracker
from replication.block_set import BLOCK_BYTES, BlockSet

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agents.mobility.device import Device
    from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk, OpenDevice

MIB = 1 << 20
COUNT = 16 * MIB // BLOCK_BYTES


def set_of(blocks: Iterable[int], count: int = COUNT) -> BlockSet:
    made = BlockSet(count)
    for block in blocks:
        made.add_run(block, 1)
    return made


@pytest.fixture
def disk(loop_disk: MakeLoopDisk) -> LoopDisk:
    return loop_disk(16 * MIB)


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(tmp_path / "digests")


def settled(device: Device, table: str) -> ScanTracker:
    tracker = ScanTracker.attach(device, table)
    tracker.swap()
    tracker.forget()
    return tracker


def test_a_scan_finds_exactly_what_differs(
    disk: LoopDisk, open_device: OpenDevice, table: str
) -> None:
    disk.write(range(500, 600))
    device = open_device(disk.path)
    assert ScanTracker.attach(device, table).fresh
    tracker = ScanTracker.attach(device, table)
    assert tracker.swap() == set_of(range(500, 600))
    tracker.forget()
    assert not tracker.fresh
    assert not tracker.swap()
    blocks = random.Random(2).sample(range(COUNT), 300)
    disk.write(blocks, b"y")
    disk.write(range(500, 520), b"x")  # as they were
    assert tracker.swap() == set_of(blocks) - set_of(range(500, 520))
    assert not tracker.peek_running()


def test_data_that_becomes_a_hole_is_found(
    disk: LoopDisk, open_device: OpenDevice, table: str
) -> None:
    disk.write([*range(100, 400), COUNT - 1])
    device = open_device(disk.path)
    tracker = settled(device, table)
    fd = os.open(disk.path, os.O_RDWR)
    try:
        fcntl.ioctl(fd, 0x1277, struct.pack("<QQ", 200 * BLOCK_BYTES, 50 * BLOCK_BYTES))
    finally:
        os.close(fd)
    runs = [range(first, first + count) for first, count in device.allocated_runs()]
    assert not any(220 in run for run in runs)
    assert tracker.swap() == set_of(range(200, 250))
    tracker.forget()
    assert not tracker.swap()


def test_a_find_that_was_not_forgotten_is_found_again(
    disk: LoopDisk, open_device: OpenDevice, table: str
) -> None:
    device = open_device(disk.path)
    tracker = settled(device, table)
    disk.write([5, 6])
    assert tracker.swap() == set_of([5, 6])
    assert tracker.peek() == set_of([5, 6])
    tracker.close()  # as if killed before the blocks were durable
    after = ScanTracker.attach(device, table)
    assert not after.fresh
    assert after.swap() == set_of([5, 6])
    after.forget()
    assert not after.swap()


def test_a_crash_in_the_middle_of_forget_only_repeats(
    disk: LoopDisk, open_device: OpenDevice, table: str
) -> None:
    device = open_device(disk.path)
    settled(device, table)
    before = Path(table).read_bytes()
    disk.write(range(64))
    tracker = ScanTracker.attach(device, table)
    tracker.swap()
    tracker.forget()
    after = Path(table).read_bytes()
    cut = 16 * 20 + 7  # in the middle of a digest
    with open(table, "wb") as file:
        file.write(after[:cut] + before[cut:])
    disk.write([70])
    assert ScanTracker.attach(device, table).swap() == set_of([*range(20, 64), 70])


def test_a_table_of_another_size_is_not_used(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, table: str
) -> None:
    settled(open_device(loop_disk(16 * MIB).path), table)
    larger = open_device(loop_disk(16 * MIB + 512).path)
    tracker = ScanTracker.attach(larger, table)
    assert tracker.fresh
    tracker.swap()
    tracker.forget()
    assert os.stat(table).st_size == 16 * (COUNT + 1)
    tracker.remove()
    assert not os.path.exists(table)


def test_the_short_last_block_is_compared(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, table: str
) -> None:
    disk = loop_disk(MIB + 512)
    device = open_device(disk.path)
    tracker = settled(device, table)
    fd = os.open(disk.path, os.O_RDWR | os.O_SYNC)
    os.pwrite(fd, b"end", MIB + 509)
    os.close(fd)
    assert tracker.swap() == set_of([256], 257)


def test_the_table_is_as_sparse_as_the_disk(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, table: str
) -> None:
    disk = loop_disk(4096 * MIB)
    disk.write([1 << 19])
    settled(open_device(disk.path), table)
    assert os.stat(table).st_size == 16 << 20
    assert os.stat(table).st_blocks * 512 <= 64 << 10

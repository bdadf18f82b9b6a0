"""A disk as a capture sees it."""

import subprocess
import uuid
from pathlib import Path

import pytest

from agents.mobility.config import DiskConfig
from agents.mobility.source import SourceDisk, is_dirty, peek_running
from agents.mobility.stillness import WriteCounts, stood_still
from agents.mobility.tracker.ebpf import EbpfTracker
from replication.block_set import BLOCK_BYTES
from replication.errors import CaptureError
from tests.agents.mobility.conftest import MakeLoopDisk, OpenDevice

SIZE = (1 << 20) + 512  # the last block is short


def test_disk_tells_blocks_holes_and_changes(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, machine: uuid.UUID
) -> None:
    loop = loop_disk(SIZE)
    loop.write([3])
    device = open_device(loop.path)
    tracker = EbpfTracker.attach(machine, 0, device)
    try:
        shape = DiskConfig(index=0, device=loop.path).shape(device.size_bytes)
        disk = SourceDisk(shape, device, tracker)
        assert disk.block_count == 257
        assert len(disk.read_blocks(255, 2)) == 2 * BLOCK_BYTES
        assert disk.read_blocks(3, 1) == b"x" * BLOCK_BYTES
        assert 3 in disk.allocated()
        assert 200 not in disk.allocated()
        assert disk.file_systems() == []
        assert not is_dirty([disk])
        loop.write([7])
        assert is_dirty([disk])
        assert 7 in peek_running([disk])[0]
        tracker.swap()
        assert not peek_running([disk])[0]
        assert is_dirty([disk])  # until it is forgotten
        tracker.forget()
        assert not is_dirty([disk])
    finally:
        tracker.close()


def test_counters_tell_every_write_also_to_the_same_block(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    loop = loop_disk(1 << 20)
    device = open_device(loop.path)
    before = WriteCounts.of(device)
    device.read(0, 1 << 20)
    assert stood_still(before, WriteCounts.of(device))
    for _ in range(3):
        loop.write([5])
        now = WriteCounts.of(device)
        assert not stood_still(before, now)
        before = now
    subprocess.run(["blkdiscard", "-o", "0", "-l", "4096", loop.path], check=True)
    assert not stood_still(before, WriteCounts.of(device))


def test_write_under_way_is_no_stillness() -> None:
    assert stood_still(WriteCounts(5, 1), WriteCounts(5, 0))
    assert not stood_still(WriteCounts(5, 0), WriteCounts(5, 1))
    assert not stood_still(WriteCounts(5, 0), WriteCounts(6, 0))


def test_counters_that_are_off_are_told_with_the_remedy(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    device = open_device(loop_disk(1 << 20).path)
    switch = Path(f"/sys/block/{device.name}/queue/iostats")
    switch.write_text("0")
    try:
        with pytest.raises(CaptureError, match="echo 1 >"):
            WriteCounts.of(device)
    finally:
        switch.write_text("1")

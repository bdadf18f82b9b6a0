"""Captures of a disk with partitions, as real machines have them."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agents.mobility.mounts import mounted_file_systems
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Consistency
from tests.agents.mobility.capture_rig import (
    MIB,
    LookInto,
    Machine,
    Worker,
    file_writer,
    last_record,
    replica_mounter,
    unrest,
)

if TYPE_CHECKING:
    import contextlib
    import uuid

    from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk

SECTOR_BYTES = 512
EXT4 = (63, 48 * MIB // SECTOR_BYTES)
"""First sector and count. As DOS laid partitions out: no file system block is one of the disk's."""

XFS = (49 * MIB // SECTOR_BYTES, 304 * MIB // SECTOR_BYTES)
RAW = (353 * MIB // SECTOR_BYTES, 2 * MIB // SECTOR_BYTES)
DISK_BYTES = 356 * MIB
FITRIM = 0xC0185879  # linux/fs.h: _IOWR('X', 121, struct fstrim_range)


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


@pytest.fixture
def look_into(tmp_path: Path) -> LookInto:
    return replica_mounter(tmp_path)


@pytest.fixture
def disk(loop_disk: MakeLoopDisk, opened: contextlib.ExitStack) -> LoopDisk:
    """A disk with three partitions."""
    made = loop_disk(DISK_BYTES)
    for number, (first, count) in enumerate((EXT4, XFS, RAW), start=1):
        subprocess.run(["addpart", made.path, *map(str, (number, first, count))], check=True)
        opened.callback(subprocess.run, ["delpart", made.path, str(number)], check=False)
    return made


def partition_node(disk: LoopDisk, number: int, folder: Path) -> Path:
    """A device node of our own: nothing makes them where neither udev nor devtmpfs is."""
    name = os.path.basename(disk.path)
    told = Path(f"/sys/block/{name}/{name}p{number}/dev").read_text()
    node = folder / f"partition{number}"
    os.mknod(node, 0o60600, os.makedev(*map(int, told.split(":"))))
    return node


def mount_partition(
    disk: LoopDisk, number: int, command: list[str], folder: Path, opened: contextlib.ExitStack
) -> Path:
    node = partition_node(disk, number, folder)
    subprocess.run([*command, str(node)], check=True, capture_output=True)
    point = folder / f"mnt{number}"
    point.mkdir()
    subprocess.run(["mount", str(node), str(point)], check=True)
    opened.callback(subprocess.run, ["umount", "-l", str(point)], check=False)
    return point


def part(image: bytes | bytearray, place: tuple[int, int]) -> bytes:
    first, count = place
    return bytes(image[first * SECTOR_BYTES : (first + count) * SECTOR_BYTES])


def test_points_of_a_disk_with_partitions_are_instants_of_all_of_them(
    source: Machine,
    disk: LoopDisk,
    tmp_path: Path,
    opened: contextlib.ExitStack,
    look_into: LookInto,
) -> None:
    ext4 = mount_partition(
        disk, 1, ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"], tmp_path, opened
    )
    xfs = mount_partition(disk, 2, ["mkfs.xfs", "-q", "-f"], tmp_path, opened)
    source.protect(disk)
    frozen = {found.mount_point for found in mounted_file_systems(source.disks[0].device)}
    assert frozen == {str(ext4), str(xfs)}
    with Worker(file_writer([ext4, xfs])) as writer:
        writer.wait_for(3)
        for _ in range(2):
            before = writer.count
            taken = source.capture()
            after = writer.count
            assert (taken.consistency, taken.reason) == (Consistency.CRASH, "")
            assert taken.pause_ns > 0
            newest = []
            for place in (EXT4, XFS):
                with look_into(part(source.replica.images[0], place)) as replica:
                    newest.append(last_record(replica / "records"))
            assert newest[0] - newest[1] in (0, 1)
            assert before <= newest[0] <= after + 1
            writer.wait_for(after + 5)
    source.capture()
    assert source.loses_nothing()


def test_discards_and_raw_writes_on_partitions_are_seen(
    source: Machine, disk: LoopDisk, tmp_path: Path, opened: contextlib.ExitStack
) -> None:
    ext4 = mount_partition(
        disk, 1, ["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0"], tmp_path, opened
    )
    source.protect(disk)
    (ext4 / "big").write_bytes(os.urandom(8 * MIB))
    source.seed()
    assert source.loses_nothing()
    (ext4 / "big").unlink()
    trim(ext4)
    with open(partition_node(disk, 3, tmp_path), "r+b") as raw:
        raw.write(b"r" * 3 * BLOCK_BYTES)
        raw.flush()
        os.fsync(raw.fileno())
    taken = source.capture(on_add=unrest(ext4))
    assert taken.consistency is Consistency.CRASH
    assert taken.pause_ns > 0
    raw_block = RAW[0] * SECTOR_BYTES // BLOCK_BYTES
    assert {raw_block, raw_block + 1, raw_block + 2} <= source.received.blocks(0)
    source.capture()
    assert source.loses_nothing()


def trim(point: Path) -> None:
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
        fcntl.ioctl(fd, FITRIM, struct.pack("=QQQ", 0, (1 << 64) - 1, 0))
    finally:
        os.close(fd)

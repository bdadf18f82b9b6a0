"""Disks as the agent reads them, on real loop devices."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from agents.mobility.device import DIRECT_READ_BYTES_MAX, Device, DeviceIdentity
from replication.block_set import BLOCK_BYTES, BlockSet
from replication.errors import ConfigError, PeerError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.agents.mobility.conftest import MakeLoopDisk, OpenDevice

MIB = 1 << 20
LOOP_CTL_ADD = 0x4C80
LOOP_CTL_REMOVE = 0x4C81


def fill(path: str, size_bytes: int) -> bytes:
    data = random.Random(9).randbytes(size_bytes)
    fd = os.open(path, os.O_RDWR | os.O_SYNC)
    try:
        assert os.pwrite(fd, data, 0) == size_bytes
    finally:
        os.close(fd)
    return data


def test_a_loop_device_is_read_through_its_image(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(4 * MIB)
    device = open_device(disk.path)
    assert device.loop_image == str(disk.image)
    assert (device.size_bytes, device.block_count, device.loop_offset) == (4 * MIB, 1024, 0)
    assert device.name == os.path.basename(disk.path)
    number = os.stat(disk.path).st_rdev
    assert device.dev == (os.major(number) << 20) | os.minor(number)
    data = fill(disk.path, 4 * MIB)
    assert device.read(0, 4 * MIB) == data
    assert device.read(5 * BLOCK_BYTES, BLOCK_BYTES) == data[5 * BLOCK_BYTES : 6 * BLOCK_BYTES]


def test_a_read_sees_what_a_mounted_file_system_would_not_show_in_the_devices_cache(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(MIB)
    device = open_device(disk.path)
    with open(disk.path, "rb") as stale:
        stale.read(MIB)  # now in the page cache of the device
        disk.write([7])
        assert device.read(7 * BLOCK_BYTES, BLOCK_BYTES) == b"x" * BLOCK_BYTES


def test_an_image_with_an_offset_is_read_where_the_disk_begins(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(4 * MIB, "-o", str(MIB), "--sizelimit", str(2 * MIB))
    device = open_device(disk.path)
    assert (device.loop_offset, device.size_bytes) == (MIB, 2 * MIB)
    data = fill(disk.path, 2 * MIB)
    assert device.read(0, 2 * MIB) == data
    assert list(device.allocated_runs()) == [(0, 512)]


def test_a_loop_device_in_direct_mode_is_read_past_the_page_cache(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    size_bytes = 2 * DIRECT_READ_BYTES_MAX + 3 * BLOCK_BYTES
    disk = loop_disk(size_bytes, "--direct-io=on")
    with open(f"/sys/block/{os.path.basename(disk.path)}/loop/dio") as file:
        assert file.read().strip() == "1"
    device = open_device(disk.path)
    assert device.loop_image is None
    data = fill(disk.path, size_bytes)
    assert device.read(0, size_bytes) == data
    assert list(device.allocated_runs()) == [(0, device.block_count)]
    with mmap.mmap(-1, size_bytes) as pages:
        device.read_into(pages, 0)
        assert pages[:] == data
    odd = bytearray(2 * BLOCK_BYTES + 1)
    with memoryview(odd) as view, view[1:] as part:
        device.read_into(part, BLOCK_BYTES)
    assert odd[1:] == data[BLOCK_BYTES : 3 * BLOCK_BYTES]


@pytest.mark.parametrize("mode", [(), ("--direct-io=on",)])
def test_a_short_last_block_is_padded_with_zeros(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, mode: tuple[str, ...]
) -> None:
    disk = loop_disk(BLOCK_BYTES + 1024, *mode)
    device = open_device(disk.path)
    assert device.block_count == 2
    data = fill(disk.path, BLOCK_BYTES + 1024)
    assert device.read(0, 2 * BLOCK_BYTES) == data + bytes(3072)
    buffer = bytearray(b"?" * BLOCK_BYTES)
    device.read_into(buffer, BLOCK_BYTES)
    assert buffer == data[BLOCK_BYTES:] + bytes(3072)


def test_a_deleted_image_is_read_through_the_device(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(MIB)
    disk.image.unlink()
    device = open_device(disk.path)
    assert device.loop_image is None
    data = fill(disk.path, MIB)
    assert device.read(0, MIB) == data


def test_another_file_under_the_images_name_is_not_read(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(MIB)
    data = fill(disk.path, MIB)
    moved = disk.image.with_suffix(".moved")
    disk.image.rename(moved)
    disk.image.write_bytes(b"?" * MIB)
    assert open_device(disk.path).read(0, MIB) == data


def test_what_cannot_be_looked_at_is_no_hole(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(MIB)
    disk.write([3])
    device = open_device(disk.path)
    reader, writer = os.pipe()  # refuses to seek, as a file system in trouble does
    os.dup2(reader, device._image_fd)
    os.close(reader)
    os.close(writer)
    with pytest.raises(StorageError, match="look for data"):
        list(device.allocated_runs())


def test_what_an_image_has_lost_at_its_end_is_no_hole(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(2 * MIB)
    disk.write([3, 300])
    device = open_device(disk.path)
    os.truncate(disk.image, MIB)
    with pytest.raises(StorageError, match="it shrank"):
        list(device.allocated_runs())


def test_holes_of_the_image_are_not_allocated(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(64 * MIB)
    device = open_device(disk.path)
    assert list(device.allocated_runs()) == []
    disk.write([0, 5000, 5001, device.block_count - 1])
    runs = list(device.allocated_runs())
    found = BlockSet(device.block_count)
    for first, count in runs:
        found.add_run(first, count)
    assert all(block in found for block in (0, 5000, 5001, device.block_count - 1))
    assert len(found) < 100
    assert len(found) == sum(count for _, count in runs)


def test_a_truncated_image_is_a_shrunk_disk(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(4 * MIB)
    device = open_device(disk.path)
    os.truncate(disk.image, MIB)
    with pytest.raises(StorageError, match="shrank"):
        device.read(0, 4 * MIB)
    with pytest.raises(StorageError, match="shrank"):
        device.read_into(bytearray(BLOCK_BYTES), 2 * MIB)
    assert device.read(0, MIB) == bytes(MIB)


def test_a_resize_is_noticed(loop_disk: MakeLoopDisk, open_device: OpenDevice) -> None:
    disk = loop_disk(4 * MIB)
    device = open_device(disk.path)
    os.truncate(disk.image, 6 * MIB)
    subprocess.run(["losetup", "-c", disk.path], check=True)
    assert device.size_now_bytes() == 6 * MIB
    assert device.size_bytes == 4 * MIB
    again = open_device(disk.path)
    assert again.identity != device.identity


def test_identity_tells_images_apart_and_survives_json(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disks = [loop_disk(MIB), loop_disk(MIB)]
    first, second = (open_device(disk.path).identity for disk in disks)
    assert first == open_device(disks[0].path).identity
    assert first.boot_id == second.boot_id
    assert first.backing != second.backing
    assert first.diskseq != second.diskseq
    inode = disks[0].image.stat()
    expected = f"{os.major(inode.st_dev)}:{os.minor(inode.st_dev)}:{inode.st_ino}"
    assert first.backing == expected
    assert DeviceIdentity.from_json(json.loads(json.dumps(first.as_json()))) == first


@pytest.mark.parametrize(
    "found",
    [None, {}, {"boot_id": "x"}, [1]],
)
def test_a_foreign_identity_is_refused(found: object) -> None:
    with pytest.raises(PeerError):
        DeviceIdentity.from_json(found)


def test_an_identity_with_a_wrong_type_is_refused() -> None:
    good = DeviceIdentity("b", "7:0", 1, 4096, "").as_json()
    with pytest.raises(PeerError):
        DeviceIdentity.from_json(good | {"size_bytes": "4096"})


def test_what_is_not_a_whole_disk_is_refused(tmp_path: Path, loop_disk: MakeLoopDisk) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(MIB))
    for path, words in (
        (str(tmp_path / "none"), "does not exist"),
        (str(file), "not a block device"),
        ("/dev/null", "not a block device"),
        (str(tmp_path), "not a block device"),
    ):
        with pytest.raises(ConfigError, match=words):
            Device.open(path)


@pytest.fixture
def empty_loop() -> Iterator[str]:
    """A loop device without an image, of a number that nobody is handed."""
    number = random.SystemRandom().randrange(1 << 10, 1 << 19)
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        fcntl.ioctl(control, LOOP_CTL_ADD, number)
        try:
            yield f"loop{number}"
        finally:
            fcntl.ioctl(control, LOOP_CTL_REMOVE, number)
    finally:
        os.close(control)


def test_an_empty_device_is_refused(tmp_path: Path, empty_loop: str) -> None:
    with open(f"/sys/block/{empty_loop}/dev") as file:
        major, minor = map(int, file.read().split(":"))
    node = tmp_path / "empty"
    os.mknod(node, 0o60600, os.makedev(major, minor))
    with pytest.raises(ConfigError, match="0 bytes"):
        Device.open(str(node))


def test_a_partition_is_refused(loop_disk: MakeLoopDisk, tmp_path: Path) -> None:
    disk = loop_disk(4 * MIB, "-P")
    name = os.path.basename(disk.path)
    subprocess.run(["partx", "-d", disk.path], check=False, capture_output=True)
    subprocess.run(["addpart", disk.path, "1", "8", "2048"], check=True)
    try:
        with open(f"/sys/block/{name}/{name}p1/dev") as file:
            major, minor = map(int, file.read().split(":"))
        node = tmp_path / "partition"
        os.mknod(node, 0o60600, os.makedev(major, minor))
        with pytest.raises(ConfigError, match="protect the whole disk"):
            Device.open(str(node))
    finally:
        subprocess.run(["delpart", disk.path, "1"], check=False)


def test_closing_leaves_no_descriptor(loop_disk: MakeLoopDisk) -> None:
    disk = loop_disk(MIB)
    before = os.listdir("/proc/self/fd")
    device = Device.open(disk.path)
    device.read(0, MIB)
    device.close()
    assert os.listdir("/proc/self/fd") == before


def test_disk_that_is_detached_is_told_as_going(
    loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    loop = loop_disk(1 << 20)
    device = open_device(loop.path)
    assert device.why_gone() == ""
    loop.detach()
    assert device.why_gone() == f"{loop.path} is being detached"
    again = open_device(loop.path)  # whoever opens it now knows that
    assert again.why_gone() == ""

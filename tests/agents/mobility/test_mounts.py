"""Finding the file systems on a disk: the parser on text, the rest on real mounts."""

from __future__ import annotations

import contextlib
import os
import subprocess
from typing import TYPE_CHECKING, Protocol

import pytest

from agents.mobility.mounts import Mount, MountedFileSystem, mounted_file_systems, parse_mountinfo
from replication.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.agents.mobility.conftest import MakeLoopDisk, OpenDevice

MIB = 1 << 20

TEXT = """\
22 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw,discard
30 22 0:26 /@home /mnt/with\\040blank ro,noatime - btrfs /dev/sd\\134b rw,subvol=/@home
31 22 8:17 / /mnt/tab\\011end rw - xfs /dev/sdb1 ro,attr2
32 22 0:27 / /run rw - tmpfs none rw
"""


def test_the_parser_reads_fields_optional_fields_and_escapes() -> None:
    assert parse_mountinfo(TEXT) == [
        Mount(22, "254:0", "/", "ext4", "/dev/vda", read_only=False),
        Mount(30, "0:26", "/mnt/with blank", "btrfs", "/dev/sd\\b", read_only=False),
        Mount(31, "8:17", "/mnt/tab\tend", "xfs", "/dev/sdb1", read_only=True),
        Mount(32, "0:27", "/run", "tmpfs", "none", read_only=False),
    ]


def test_the_parser_reads_this_machine() -> None:
    with open("/proc/self/mountinfo") as file:
        text = file.read()
    assert len(parse_mountinfo(text)) == len(text.splitlines())


class MountAt(Protocol):
    def __call__(self, source: str, name: str, *options: str) -> str: ...


@pytest.fixture
def mount_at(loop_disk: MakeLoopDisk, tmp_path: Path) -> Iterator[MountAt]:
    with contextlib.ExitStack() as mounted:

        def mount(source: str, name: str, *options: str) -> str:
            folder = str(tmp_path / name)
            os.makedirs(folder, exist_ok=True)
            subprocess.run(["mount", *options, source, folder], check=True)
            mounted.callback(subprocess.run, ["umount", folder], check=False)
            return folder

        yield mount


def test_a_file_system_is_told_once_however_often_it_is_mounted(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, mount_at: MountAt
) -> None:
    disk, other = loop_disk(16 * MIB), loop_disk(16 * MIB)
    for path in (disk.path, other.path):
        subprocess.run(["mkfs.ext4", "-q", path], check=True)
    device = open_device(disk.path)
    assert mounted_file_systems(device) == []
    mount_at(other.path, "other")
    folder = mount_at(disk.path, "a b")
    mount_at(folder, "bound", "--bind")
    number = f"{device.dev >> 20}:{device.dev & 0xFFFFF}"
    assert mounted_file_systems(device) == [
        MountedFileSystem(folder, "ext4", disk.path, number, read_only=False)
    ]


def test_a_read_only_file_system_is_flagged(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, mount_at: MountAt
) -> None:
    disk = loop_disk(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", disk.path], check=True)
    mount_at(disk.path, "ro", "-o", "ro")
    (found,) = mounted_file_systems(open_device(disk.path))
    assert found.read_only


def test_a_btrfs_is_found_by_any_of_its_disks(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, mount_at: MountAt
) -> None:
    disks = [loop_disk(128 * MIB), loop_disk(128 * MIB)]
    paths = [disk.path for disk in disks]
    subprocess.run(["mkfs.btrfs", "-q", "-d", "single", "-m", "raid1", *paths], check=True)
    folder = mount_at(paths[0], "btrfs", "-o", f"device={paths[1]}")
    subprocess.run(["btrfs", "-q", "subvolume", "create", f"{folder}/sub"], check=True)
    mount_at(paths[0], "sub", "-o", f"subvol=sub,device={paths[1]}")
    for path in paths:
        (found,) = mounted_file_systems(open_device(path))
        assert (found.mount_point, found.fs_type) == (folder, "btrfs")
    other = loop_disk(16 * MIB)
    assert mounted_file_systems(open_device(other.path)) == []


def test_a_covered_mount_point_is_not_taken_for_the_file_system(
    loop_disk: MakeLoopDisk, open_device: OpenDevice, mount_at: MountAt
) -> None:
    disk = loop_disk(16 * MIB)
    subprocess.run(["mkfs.ext4", "-q", disk.path], check=True)
    first = mount_at(disk.path, "first")
    mount_at("none", "first", "-t", "tmpfs")
    device = open_device(disk.path)
    with pytest.raises(CaptureError, match="covered"):
        mounted_file_systems(device)
    second = mount_at(disk.path, "second")
    (found,) = mounted_file_systems(device)
    assert found.mount_point == second != first

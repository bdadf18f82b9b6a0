"""This machine's disks, as an operator is told of them."""

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.mobility.inventory import FoundDisk, describe, find, read_inventory, stable_id
from replication.control.report import BlockDevice, MachineReport
from tests.agents.mobility.conftest import MakeLoopDisk

MIB = 1 << 20


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        (FoundDisk("sda", 1), "/dev/sda"),
        (
            FoundDisk("sda", 1, ("ata-QEMU_1", "wwn-0x5", "usb-x")),
            "/dev/disk/by-id/wwn-0x5",
        ),
        (
            FoundDisk("nvme0n1", 1, ("nvme-Model_Serial_1", "nvme-Model_Serial", "nvme-eui.00")),
            "/dev/disk/by-id/nvme-eui.00",
        ),
        (FoundDisk("vda", 1, ("b-2", "a-22", "a-2")), "/dev/disk/by-id/a-2"),
        (FoundDisk("loop3", 1, backing="/x/a.img"), "/x/a.img"),
        (FoundDisk("loop3", 1, backing="/x/a.img", offset_bytes=512), "/x/a.img@512"),
    ],
)
def test_disk_has_the_name_that_says_most(disk: FoundDisk, expected: str) -> None:
    assert stable_id(disk) == expected


@given(st.lists(st.sampled_from(["wwn-1", "scsi-3", "ata-a", "x"]), min_size=1, unique=True))
def test_name_does_not_hang_on_the_order_of_the_links(links: list[str]) -> None:
    assert stable_id(FoundDisk("sda", 1, tuple(links))) == stable_id(
        FoundDisk("sda", 1, tuple(reversed(links)))
    )


def test_name_that_two_disks_have_is_none() -> None:
    told = describe([FoundDisk("loop1", 1, backing="/a"), FoundDisk("loop2", 1, backing="/a")])
    assert [device.id for device in told] == ["/dev/loop1", "/dev/loop2"]


def test_disk_that_holds_the_system_says_so() -> None:
    system, data = describe(
        [
            FoundDisk("sda", 1, mount_points=("/boot/efi", "/srv")),
            FoundDisk("sdb", 1, mount_points=("/var/lib/db", "/bad\udcff")),
        ]
    )
    assert (system.is_system, data.is_system) == (True, False)
    assert data.mounts == ("/var/lib/db", "/bad\N{REPLACEMENT CHARACTER}")
    MachineReport(time_ns=1, devices=(system, data)).model_dump_json()


def test_disk_is_found_by_its_id_at_another_path() -> None:
    before = BlockDevice(id="/dev/disk/by-id/wwn-1", device="/dev/sdb", size_bytes=1)
    other = BlockDevice(id="/dev/disk/by-id/wwn-2", device="/dev/sdb", size_bytes=1)
    now = before.model_copy(update={"device": "/dev/sdc"})
    assert find([other, now], "/dev/disk/by-id/wwn-1") is now
    assert find([other, now], "/dev/sdb") is other
    assert find([other], "/dev/disk/by-id/wwn-1") is None


def test_loop_device_is_known_by_its_image_and_its_mounts_are_told(
    loop_disk: MakeLoopDisk, tmp_path: Path
) -> None:
    disk = loop_disk(32 * MIB)
    other = loop_disk(MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk.path], check=True)
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mount", disk.path, str(point)], check=True)
    try:
        state = str(tmp_path / "state")
        devices = read_inventory(tracker="ebpf", state_folder=state)
        found = find(devices, str(disk.image))
        assert found == BlockDevice(
            id=str(disk.image), device=disk.path, size_bytes=32 * MIB, mounts=(str(point),)
        )
        assert {disk.path, other.path} <= {device.device for device in devices}
        chosen = read_inventory(
            tracker="ebpf", state_folder=str(point / "state"), only=[str(disk.image), "/dev/gone"]
        )
        assert [device.device for device in chosen] == [disk.path]
        assert "frozen for each point" in chosen[0].reason
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True)


def test_partitions_mounts_are_the_disks(loop_disk: MakeLoopDisk, tmp_path: Path) -> None:
    disk = loop_disk(64 * MIB, "-P")
    name = os.path.basename(disk.path)
    subprocess.run(["addpart", disk.path, "1", "2048", "65536"], check=True)
    node, point = tmp_path / "partition", tmp_path / "mnt"
    point.mkdir()
    try:
        major, minor = map(int, Path(f"/sys/block/{name}/{name}p1/dev").read_text().split(":"))
        os.mknod(node, 0o60600, os.makedev(major, minor))
        subprocess.run(["mkfs.ext4", "-q", "-F", str(node)], check=True)
        subprocess.run(["mount", str(node), str(point)], check=True)
        devices = read_inventory(tracker="ebpf", state_folder="/nowhere", only=[disk.path])
        assert [(device.device, device.mounts) for device in devices] == [
            (disk.path, (str(point),))
        ]
    finally:
        subprocess.run(["umount", "-l", str(point)], check=False)
        subprocess.run(["delpart", disk.path, "1"], check=False)

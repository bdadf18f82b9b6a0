import os
import subprocess
import threading
from pathlib import Path

import pytest
from pydantic import ValidationError

from replication.errors import ConfigError, StorageError
from tests.vsphere_emu.conftest import MakeGuest, is_alive
from vsphere_emu import block_device
from vsphere_emu.config import DiskConfig
from vsphere_emu.guest import Guest

MIB = 1 << 20
SIZES = {"ext4": 32 * MIB, "xfs": 320 * MIB, "btrfs": 128 * MIB, "none": 8 * MIB}


def disk(kind: str, name: str = "data") -> dict[str, object]:
    return {"name": name, "size_bytes": SIZES[kind], "file_system": kind}


def flat_paths(guest: Guest) -> list[str]:
    return [one.flat_path for one in guest.status().disks]


def assert_no_trace(guest: Guest, flats: list[str]) -> None:
    assert not [loop for flat in flats for loop in block_device.loops_of(flat)]
    assert not [one for one in block_device.mounts() if one.point.startswith(guest.folder + "/")]
    assert not os.path.exists(guest.folder)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_files_survive_power_off_and_on(make_guest: MakeGuest, kind: str) -> None:
    guest = make_guest(name="web-01", disks=[disk(kind)])
    guest.power_on()
    status = guest.status()
    assert status.is_powered_on
    mounted = block_device.mounted_at(f"{guest.folder}/data")
    assert mounted is not None
    assert (mounted.device, mounted.file_system) == (status.disks[0].device, kind)
    Path(f"{guest.folder}/data/file").write_text("kept")
    guest.power_off()
    assert not guest.status().is_powered_on
    assert block_device.loops_of(status.disks[0].flat_path) == ()
    guest.power_on()
    assert Path(f"{guest.folder}/data/file").read_text() == "kept"


def test_commands_repeat_without_effect(make_guest: MakeGuest) -> None:
    guest = make_guest(name="web-01", disks=[disk("ext4"), disk("none", "raw")])
    guest.power_on()
    first = guest.status()
    guest.power_on()
    assert guest.status() == first
    assert len([one for one in block_device.mounts() if guest.folder in one.point]) == 1
    guest.power_off()
    guest.power_off()
    guest.remove_all_traces(delete_disks=True)
    guest.remove_all_traces(delete_disks=True)


def test_raw_disk_is_attached_and_left_alone(make_guest: MakeGuest) -> None:
    guest = make_guest(name="raw-01", disks=[disk("none")])
    guest.power_on()
    told = guest.status().disks[0]
    assert told.device is not None
    assert told.mount is None
    assert Path(told.flat_path).read_bytes() == bytes(8 * MIB)


def test_disk_attached_by_a_run_that_was_cut_off_is_found(make_guest: MakeGuest) -> None:
    guest = make_guest(name="web-01", disks=[disk("ext4")])
    guest.power_on()
    guest.power_off()
    flat = flat_paths(guest)[0]
    device = subprocess.run(
        ["losetup", "-f", "--show", flat], check=True, capture_output=True, text=True
    ).stdout.strip()
    guest.power_on()
    assert guest.status().disks[0].device == device
    assert block_device.loops_of(flat) == (device,)


def test_file_system_cut_off_in_the_making_is_made_again(make_guest: MakeGuest) -> None:
    guest = make_guest(name="web-01", disks=[disk("ext4")])
    guest.power_on()
    guest.power_off()
    flat = flat_paths(guest)[0]
    with open(flat, "r+b") as file:  # a superblock is there, what it speaks of is not
        file.seek(8192)
        file.write(bytes(4 * MIB))
    marker = Path(os.path.dirname(guest.log_path), "web-01.data.formatting")
    marker.touch()
    guest.power_on()
    Path(f"{guest.folder}/data/file").write_text("fine")
    assert not marker.exists()


def test_disk_with_another_file_system_is_not_overwritten(make_guest: MakeGuest) -> None:
    guest = make_guest(name="web-01", disks=[disk("ext4")])
    guest.power_on()
    guest.power_off()
    other = make_guest(name="web-01", disks=[{**disk("ext4"), "file_system": "xfs"}])
    with pytest.raises(StorageError, match="holds ext4, the configuration says xfs"):
        other.power_on()


def test_disk_of_another_size_is_refused(make_guest: MakeGuest) -> None:
    make_guest(name="web-01", disks=[disk("ext4")]).power_on()
    other = make_guest(name="web-01", disks=[{**disk("ext4"), "size_bytes": 64 * MIB}])
    with pytest.raises(ConfigError, match="has 33554432 bytes, the configuration says 67108864"):
        other.power_on()


def test_remove_cleans_half_made_states(make_guest: MakeGuest) -> None:
    guest = make_guest(name="web-01", disks=[disk("ext4"), disk("xfs", "log")])
    guest.power_on()
    flats = flat_paths(guest)
    block_device.unmount(f"{guest.folder}/data")  # one mounted, one attached, one twice mounted
    subprocess.run(["mount", "--bind", f"{guest.folder}/log", f"{guest.folder}/data"], check=True)
    subprocess.run(["losetup", "-f", flats[0]], check=True)
    guest.remove_all_traces(delete_disks=True)
    assert_no_trace(guest, flats)
    assert not any(os.path.exists(flat) for flat in flats)


def test_remove_thaws_a_frozen_file_system(make_guest: MakeGuest) -> None:
    guest = make_guest(name="web-01", disks=[disk("ext4")])
    guest.power_on()
    flats = flat_paths(guest)
    subprocess.run(["fsfreeze", "--freeze", f"{guest.folder}/data"], check=True)
    writer = threading.Thread(target=Path(f"{guest.folder}/data/late").write_text, args=("x",))
    writer.start()  # hangs in the kernel until thawed
    guest.remove_all_traces(delete_disks=True)
    writer.join(10)
    assert not writer.is_alive()
    assert_no_trace(guest, flats)


def test_remove_finds_loop_devices_of_deleted_files(make_guest: MakeGuest) -> None:
    guest = make_guest(name="raw-01", disks=[disk("none")])
    guest.power_on()
    flats = flat_paths(guest)
    os.unlink(flats[0])
    guest.remove_all_traces(delete_disks=True)
    assert_no_trace(guest, flats)


def test_remove_takes_away_all_but_the_disk_that_is_held_open(
    make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_device, "BUSY_SECONDS_MAX", 0.5)
    guest = make_guest(name="web-01", disks=[disk("none"), disk("ext4", name="second")])
    guest.power_on()
    first, second = flat_paths(guest)
    device = guest.status().disks[0].device
    assert device is not None
    with (
        Path(device).open("rb"),
        pytest.raises(StorageError, match=f"{device} over .* is still open"),
    ):
        guest.remove_all_traces(delete_disks=True)
    assert block_device.loops_of(second) == ()
    assert not Path(first).exists()
    assert not Path(guest.folder).exists()
    guest.remove_all_traces(delete_disks=True)
    assert block_device.loops_of(first) == ()


def test_holder_of_a_mount_is_named(make_guest: MakeGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_device, "BUSY_SECONDS_MAX", 0.5)
    guest = make_guest(name="web-01", disks=[disk("ext4")])
    guest.power_on()
    with (
        open(f"{guest.folder}/data/open", "w"),
        pytest.raises(StorageError, match=f"held by process .*{os.getpid()}"),
    ):
        guest.power_off()
    guest.power_off()
    assert not guest.status().is_powered_on


def imaged(image: Path, **more: object) -> dict[str, object]:
    return {"name": "os", "size_bytes": 32 * MIB, "file_system": "ext4", "image": str(image)} | more


def partitions_of(device: str) -> list[str]:
    name = os.path.basename(device)
    return [path.name for path in Path(f"/sys/block/{name}").glob(f"{name}p*")]


def test_disk_of_an_image_is_mounted_by_its_partition(
    make_guest: MakeGuest, parted_image: Path
) -> None:
    guest = make_guest(name="boot-01", disks=[imaged(parted_image)])
    guest.power_on()
    status = guest.status().disks[0]
    assert status.device is not None
    mounted = block_device.mounted_at(f"{guest.folder}/os")
    assert mounted is not None
    assert (mounted.device, mounted.file_system) == (f"{status.device}p1", "ext4")
    # the partition belongs to the one loop device that there is over the disk
    assert block_device.loops_of(status.flat_path) == (status.device,)
    assert Path(f"{guest.folder}/os/seed").read_text() == "from the image"
    Path(f"{guest.folder}/os/file").write_text("kept")
    guest.power_on()
    assert guest.status().disks[0] == status
    guest.power_off()
    assert partitions_of(status.device) == []
    assert block_device.loops_of(status.flat_path) == ()
    guest.power_on()
    assert Path(f"{guest.folder}/os/file").read_text() == "kept"
    guest.remove_all_traces(delete_disks=True)
    assert partitions_of(status.device) == []
    assert_no_trace(guest, [status.flat_path])


def test_image_is_copied_once_and_stays_as_it_is(make_guest: MakeGuest, parted_image: Path) -> None:
    before = parted_image.read_bytes()
    guest = make_guest(name="boot-01", disks=[imaged(parted_image, size_bytes=40 * MIB)])
    guest.create_disks()
    flat = Path(flat_paths(guest)[0])
    assert flat.read_bytes() == before + bytes(8 * MIB)
    assert flat.stat().st_blocks * 512 < 4 * MIB
    guest.power_on()
    Path(f"{guest.folder}/os/seed").write_text("changed")
    guest.power_off()
    assert parted_image.read_bytes() == before
    assert flat.read_bytes()[: len(before)] != before


def test_image_that_does_not_fit_is_told(
    make_guest: MakeGuest, parted_image: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"33554432 bytes, the disk only 16777216"):
        make_guest(name="a", disks=[imaged(parted_image, size_bytes=16 * MIB)]).power_on()
    with pytest.raises(ConfigError, match="cannot read the image"):
        make_guest(name="b", disks=[imaged(tmp_path / "gone.img")]).power_on()
    with pytest.raises(StorageError, match="holds ext4, the configuration says xfs"):
        make_guest(name="c", disks=[imaged(parted_image, file_system="xfs")]).power_on()
    empty = tmp_path / "empty.img"
    with open(empty, "wb") as file:
        file.truncate(32 * MIB)
    with pytest.raises(StorageError, match="holds no file system"):
        make_guest(name="d", disks=[imaged(empty)]).power_on()


def test_image_without_a_file_system_to_mount_is_refused() -> None:
    with pytest.raises(ValidationError, match="say which file_system"):
        DiskConfig.model_validate({"name": "os", "size_bytes": 32 * MIB, "image": "/disk.img"})


def test_partition_left_by_a_run_that_was_cut_off_is_found(
    make_guest: MakeGuest, parted_image: Path
) -> None:
    guest = make_guest(name="boot-01", disks=[imaged(parted_image)])
    guest.power_on()
    status = guest.status().disks[0]
    assert status.device is not None
    subprocess.run(["umount", f"{guest.folder}/os"], check=True)
    assert partitions_of(status.device) != []
    guest.power_on()
    assert guest.status().disks[0] == status


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_power_cut_changes_no_byte_of_a_frozen_disk(make_guest: MakeGuest, kind: str) -> None:
    work = {"kind": "files", "disk": "data", "changes_per_second": 200}
    guest = make_guest(name="web-01", disks=[disk(kind), disk("none", "raw")], workload=work)
    guest.power_on()
    pid = guest.start_workload()
    assert pid is not None
    subprocess.run(["fsfreeze", "--freeze", f"{guest.folder}/data"], check=True)
    flats = flat_paths(guest)
    before = Path(flats[0]).read_bytes()
    guest.cut_power()
    assert Path(flats[0]).read_bytes() == before
    assert not is_alive(pid)
    assert not any(block_device.loops_of(flat) for flat in flats)
    assert not guest.status().is_powered_on
    guest.cut_power()
    guest.power_on()
    assert os.listdir(f"{guest.folder}/data/files")
    guest.power_off()


def test_power_cut_writes_nothing_out(make_guest: MakeGuest) -> None:
    guest = make_guest(name="web-01", disks=[disk("ext4")])
    guest.power_on()
    with open(f"{guest.folder}/data/kept", "wb", buffering=0) as file:
        file.write(b"kept")
        os.fsync(file.fileno())
    Path(f"{guest.folder}/data/lost").write_bytes(b"in memory alone")
    guest.cut_power()
    guest.power_on()
    assert Path(f"{guest.folder}/data/kept").read_bytes() == b"kept"
    assert not Path(f"{guest.folder}/data/lost").exists()

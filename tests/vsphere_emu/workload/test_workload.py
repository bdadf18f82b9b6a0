import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replication.errors import ConfigError, IntegrityError
from tests.vsphere_emu.conftest import MakeGuest, is_alive
from vsphere_emu import block_device
from vsphere_emu.check import check_file_system
from vsphere_emu.guest import Guest
from vsphere_emu.workload.web import check_pages

MIB = 1 << 20


@pytest.fixture
def web(make_guest: MakeGuest) -> Guest:
    return make_guest(
        name="web-01",
        disks=[{"name": "www", "size_bytes": 64 * MIB, "file_system": "ext4"}],
        workload={"kind": "web", "disk": "www", "writes_per_second": 400},
    )


@pytest.fixture
def files(make_guest: MakeGuest) -> Guest:
    return make_guest(
        name="files-01",
        disks=[{"name": "share", "size_bytes": 256 * MIB, "file_system": "btrfs"}],
        workload={
            "kind": "files",
            "disk": "share",
            "changes_per_second": 500,
            "trim_interval_seconds": 0.5,
        },
    )


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_entries(folder: str, count: int) -> None:
    wait_for(lambda: len(os.listdir(folder)) > count)


@contextlib.contextmanager
def frozen(folder: str) -> Iterator[None]:
    subprocess.run(["fsfreeze", "--freeze", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", folder], check=True)


def test_web_disk_is_whole_at_any_frozen_moment(web: Guest, tmp_path: Path) -> None:
    web.power_on()
    assert web.start_workload() == web.status().workload_pid
    folder, image = f"{web.folder}/www", str(tmp_path / "moment.img")
    for round_number in range(1, 4):
        wait_for_entries(f"{folder}/pages", 40 * round_number)
        with frozen(folder):
            flat = web.status().disks[0].flat_path
            subprocess.run(["cp", "--sparse=always", flat, image], check=True)
        report = check_file_system(image, str(tmp_path), check_pages)
        assert report.file_system == "ext4"
        assert report.files > 40 * round_number


def test_torn_page_and_gap_in_the_log_are_found(web: Guest) -> None:
    web.power_on()
    web.start_workload()
    folder = Path(web.folder, "www")
    wait_for_entries(f"{folder}/pages", 20)
    wait_for((folder / "access.log").exists)
    web.stop_workload()
    report = check_pages(str(folder))
    assert report.pages > 20
    page = next((folder / "pages").glob("*.html"))
    content = page.read_bytes()
    page.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=f"{page.name} is torn"):
        check_pages(str(folder))
    page.write_bytes(content)
    with (folder / "access.log").open("ab") as log:
        log.write(b"999999 GET / 200\nhalf a li")
    with pytest.raises(IntegrityError, match="to 999999"):
        check_pages(str(folder))


def test_web_goes_on_after_sigkill_without_a_gap(web: Guest) -> None:
    web.power_on()
    for round_number in range(1, 4):
        pid = web.start_workload()
        assert pid is not None
        wait_for_entries(f"{web.folder}/www/pages", 40 * round_number)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: web.status().workload_pid is None)
    check_pages(f"{web.folder}/www")


def test_churn_deletes_punches_and_trims(files: Guest) -> None:
    files.power_on()
    files.start_workload()
    folder = Path(files.folder, "share", "files")
    flat = Path(files.status().disks[0].flat_path)
    wait_for(lambda: flat.stat().st_blocks * 512 > 60 * MIB)
    biggest = 0

    def trimmed() -> bool:
        nonlocal biggest
        allocated = flat.stat().st_blocks
        biggest = max(biggest, allocated)
        return allocated < biggest - 2048

    wait_for(trimmed)
    assert any(
        path.stat().st_blocks * 512 < path.stat().st_size - 4096 for path in folder.iterdir()
    )
    files.power_off()
    check_file_system(str(flat), str(flat.parent.parent))


def test_btrfs_copy_is_checked_while_its_source_is_mounted(files: Guest, tmp_path: Path) -> None:
    files.power_on()
    files.start_workload()
    folder, image = f"{files.folder}/share", str(tmp_path / "moment.img")
    wait_for_entries(f"{folder}/files", 30)
    with frozen(folder):
        flat = files.status().disks[0].flat_path
        subprocess.run(["cp", "--sparse=always", flat, image], check=True)
    seen: list[str] = []
    report = check_file_system(image, str(tmp_path), lambda point: seen.extend(os.listdir(point)))
    assert report.file_system == "btrfs"
    assert seen == ["files"]


@pytest.mark.parametrize(("kind", "size"), [("ext4", 64), ("xfs", 320), ("btrfs", 128)])
def test_damaged_file_system_is_found(tmp_path: Path, kind: str, size: int) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(size * MIB)
    source = tmp_path / "point"
    source.mkdir()
    device = block_device.attach(str(image))
    try:
        block_device.make_file_system(device, kind)
        block_device.mount(device, str(source), kind, "rw")
        for number in range(200):
            (source / f"{number}").write_bytes(b"x" * 9000)
    finally:
        block_device.unmount_by_force(str(source))
        block_device.detach(str(image))
    assert check_file_system(str(image), str(tmp_path)).file_system == kind
    content = bytearray(image.read_bytes())
    for offset in range(MIB // 2, len(content) - 512, 2 * 4096):  # all but the first superblock
        if any(content[offset : offset + 512]):
            content[offset : offset + 512] = b"\xa5" * 512
    image.write_bytes(content)
    with pytest.raises(IntegrityError):
        check_file_system(str(image), str(tmp_path))


def test_empty_disk_is_no_file_system(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    with pytest.raises(IntegrityError, match="no known file system, but nothing"):
        check_file_system(str(image), str(tmp_path))
    assert os.listdir(tmp_path) == ["disk.img"]


def test_second_workload_on_a_guest_is_the_first(web: Guest) -> None:
    web.power_on()
    assert web.start_workload() == web.start_workload()
    web.stop_workload()
    web.stop_workload()
    assert web.status().workload_pid is None


def test_workload_of_a_guest_that_is_off_is_refused(web: Guest) -> None:
    with pytest.raises(ConfigError, match="web-01 is off"):
        web.start_workload()


def test_workload_without_its_mount_ends_with_the_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vsphere_emu.workload", "--lock", f"{tmp_path}/lock"]
    command += ["--workload", '{"kind": "web", "disk": "www"}', "--mount", f"www={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: nothing is mounted at {tmp_path}")


def test_remove_ends_a_running_workload(web: Guest) -> None:
    web.power_on()
    pid = web.start_workload()
    assert pid is not None
    web.remove_all_traces(delete_disks=True)
    assert not is_alive(pid)

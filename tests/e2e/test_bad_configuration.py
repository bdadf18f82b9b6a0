"""What cannot work is said in one clear line, with an exit code, and nothing is lost by it."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.disk import run
from tests.e2e.load import churning
from tests.e2e.part import Part
from tests.e2e.rig import Rig

_MIB = 1 << 20


def assert_ends(part: Part, exit_code: int, *words: str) -> None:
    """The part ends by itself with that code and one error that has all the words."""
    part.log.unlink(missing_ok=True)
    assert part.run_to_end() == exit_code, part.tail()
    said = part.tail()
    assert "Traceback" not in said
    errors = [line for line in said.splitlines() if "error" in line.split(":")[0]]
    errors += [line for line in said.splitlines() if "[error" in line]
    assert len(errors) == 1, said
    for word in words:
        assert word in errors[0], said


@pytest.mark.parametrize("name", ["azure-emu", "process-server", "applier", "agent"])
def test_unknown_keys_are_named(rig: Rig, name: str) -> None:
    rig.add_disk(_MIB)
    rig.settings[name] = {"service": {"helth_port": 1}}
    rig.configure()
    part = next(part for part in rig.parts if part.name == name)
    assert_ends(part, 2, "service.helth_port: unknown key", str(part.config))


@pytest.mark.parametrize("name", ["azure-emu", "process-server", "applier", "agent"])
def test_a_missing_configuration_is_named(rig: Rig, name: str) -> None:
    part = next(part for part in rig.parts if part.name == name)
    assert_ends(part, 2, "cannot read the configuration", str(part.config))


def test_disks_that_are_none_are_refused(rig: Rig) -> None:
    disk = rig.add_disk(_MIB)
    for path, words in (
        ("/dev/no-such-disk", ("/dev/no-such-disk does not exist",)),
        (str(disk.image), ("is not a block device",)),
    ):
        disk_config = {"index": 0, "device": path}
        rig.settings["agent"] = {"disks": [disk_config]}
        rig.configure()
        assert_ends(rig.agent, 2, *words)


def test_a_disk_that_cannot_be_tracked_is_refused(rig: Rig, zram: str) -> None:
    rig.settings["agent"] = {"disks": [{"index": 0, "device": zram}]}
    rig.configure()
    assert_ends(rig.agent, 7, f"{zram} cannot be tracked", "completes no requests", "scan")


def test_a_disk_that_shrank_is_refused_and_its_points_stay(rig: Rig) -> None:
    disk = rig.add_disk(8 * _MIB)
    disk.image.write_bytes(os.urandom(8 * _MIB))
    rig.start()
    rig.wait_for_point()
    point = rig.assert_newest_equals_source()
    before = disk.image.read_bytes()
    rig.agent.is_wanted = False
    with disk.image.open("r+b") as file:
        file.truncate(4 * _MIB)
    run("losetup", "-c", disk.device)
    rig.wait_until("the agent to end", lambda: not rig.agent.is_alive)
    assert rig.agent.exit_code == 7, rig.agent.tail()
    assert f"{4 * _MIB} bytes now, not {8 * _MIB}" in rig.agent.tail()
    assert_ends(rig.agent, 7, f"shrank from {8 * _MIB} to {4 * _MIB} bytes")
    with rig.reader().open_view(point.position, 0) as view:
        assert view.read(0, 8 * _MIB) == before


@pytest.mark.parametrize("place", ["spool", "store"])
def test_a_full_disk_is_told_and_survived(rig: Rig, place: str) -> None:
    folder = rig.folder / place
    disk = rig.add_disk(128 * _MIB, "ext4")
    with small_file_system(folder, 24 * _MIB):
        rig.start()
        rig.wait_for_point()
        part, told = (
            (rig.process_server, rig.agent) if place == "spool" else (rig.applier, rig.applier)
        )
        with churning("files", disk.mount_point):
            if place == "spool":
                rig.azure.stop()  # nothing drains
            rig.wait_until(
                "the full disk to be told",
                lambda: "No space left" in str(told.health()),
                seconds_max=120,
            )
            assert part.is_alive
            run("mount", "-o", f"remount,size={1024 * _MIB}", folder)
            if place == "spool":
                rig.azure.start()
            rig.wait_for_point()
        disk.unmount()
        rig.assert_newest_equals_source()
        rig.assert_one_unbroken_stream()
        for running in rig.parts:
            assert "Traceback" not in running.log.read_text()
            running.clean_up()


@contextlib.contextmanager
def small_file_system(folder: Path, size_bytes: int) -> Iterator[None]:
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=0700", "tmpfs", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def zram() -> Iterator[str]:
    """A disk in compressed memory, whose driver completes no requests."""
    if not os.path.exists("/sys/class/zram-control"):
        run("modprobe", "zram")
    number = Path("/sys/class/zram-control/hot_add").read_text().strip()
    device = f"/dev/zram{number}"
    is_made = False
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(4 * _MIB))
        if not os.path.exists(device):
            major, minor = map(int, Path(f"/sys/block/zram{number}/dev").read_text().split(":"))
            os.mknod(device, 0o60600, os.makedev(major, minor))
            is_made = True
        yield device
    finally:
        Path("/sys/class/zram-control/hot_remove").write_text(number)
        if is_made:
            os.unlink(device)

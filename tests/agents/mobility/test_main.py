"""The command, as a process."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.mobility.device import Device
from agents.mobility.freezer import FIFREEZE, FITHAW
from agents.mobility.stream_state import StreamStateFile
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.pins import ROOT
from replication.block_set import BLOCK_BYTES, BlockSet
from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk, OpenDevice
from tests.agents.mobility.script_server import Authority

MIB = 1 << 20


class Agent:
    """A configuration, and the command run with it."""

    def __init__(self, machine: uuid.UUID, folder: Path) -> None:
        self.machine, self.folder = machine, folder
        self.state = folder / "state"
        tls = Authority(folder, "ca").issue(str(machine))
        key = folder / "data.key"
        key.write_text("cd" * 32)
        key.chmod(0o600)
        self.head = f"""
machine = "{machine}"
data_key_file = "{key}"
state_folder = "{self.state}"
process_server = "https://localhost:1"
tls = {{ certificate = "{tls.certificate}", key = "{tls.key}", ca = "{tls.ca}" }}
"""
        self.path = folder / "agent.toml"

    def protects(self, *paths: str, more: str = "") -> None:
        disks = ", ".join(
            f'{{ index = {index}, device = "{path}" }}' for index, path in enumerate(paths)
        )
        self.path.write_text(f"{self.head}\ndisks = [{disks}]\n{more}")

    def command(self, action: str) -> list[str]:
        return [sys.executable, "-m", "agents.mobility", "--config", str(self.path), action]

    def run(self, action: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(action), capture_output=True, text=True, check=False, timeout=60
        )


@pytest.fixture
def agent(machine: uuid.UUID, tmp_path: Path) -> Agent:
    return Agent(machine, tmp_path)


def test_check_finds_nothing_wrong_and_changes_nothing(
    agent: Agent, loop_disk: MakeLoopDisk
) -> None:
    agent.protects(loop_disk(MIB).path)
    done = agent.run("check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not agent.state.exists()
    assert not os.path.exists(f"{ROOT}/{agent.machine}")


def test_check_tells_what_is_wrong_in_words(agent: Agent, loop_disk: MakeLoopDisk) -> None:
    disk = loop_disk(MIB)
    wrong = {
        "does not exist": (agent.protects, ("/dev/gone",)),
        "not a block device": (agent.protects, ("/dev/null",)),
    }
    for told, (protect, paths) in wrong.items():
        protect(*paths)
        done = agent.run("check")
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr
    agent.protects(disk.path, more='[app_consistency]\npre = ["/gone/script"]')
    done = agent.run("check")
    assert (done.returncode, "/gone/script" in done.stderr) == (2, True)
    agent.protects(disk.path)
    os.chmod(agent.folder / "data.key", 0o644)
    done = agent.run("check")
    assert (done.returncode, "chmod 600" in done.stderr) == (2, True)


def test_unknown_action_is_refused(agent: Agent, loop_disk: MakeLoopDisk) -> None:
    agent.protects(loop_disk(MIB).path)
    done = agent.run("dance")
    assert done.returncode == 2
    assert "invalid choice" in done.stderr


@pytest.fixture
def frozen(loop_disk: MakeLoopDisk, tmp_path: Path) -> Iterator[tuple[LoopDisk, int]]:
    """A frozen file system and a file descriptor on it."""
    disk = loop_disk(32 * MIB)
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", disk.path], check=True)
    subprocess.run(["mount", disk.path, str(point)], check=True)
    fd = os.open(point, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FIFREEZE, 0)
        yield disk, fd
    finally:
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, FITHAW, 0)
        os.close(fd)
        subprocess.run(["umount", "-l", str(point)], check=False)


def is_frozen(fd: int) -> bool:
    try:
        fcntl.ioctl(fd, FITHAW, 0)
    except OSError:
        return False
    return True


def test_thaw_ends_a_freeze_that_was_left(agent: Agent, frozen: tuple[LoopDisk, int]) -> None:
    disk, fd = frozen
    agent.protects(disk.path)
    assert agent.run("thaw").returncode == 0
    assert not is_frozen(fd)
    assert agent.run("thaw").returncode == 0


def test_missing_disk_keeps_no_other_one_frozen(agent: Agent, frozen: tuple[LoopDisk, int]) -> None:
    disk, fd = frozen
    agent.protects("/dev/gone", disk.path)
    done = agent.run("thaw")
    assert not is_frozen(fd)
    assert done.returncode == 2
    assert "/dev/gone does not exist" in done.stderr


def test_forget_stops_tracking_and_the_next_start_knows(
    agent: Agent, loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    disk = loop_disk(MIB)
    agent.protects(disk.path)
    device = open_device(disk.path)
    tracker = EbpfTracker.attach(agent.machine, 0, device)
    tracker.swap()
    tracker.forget()
    tracker.close()
    assert agent.run("forget").returncode == 0
    assert not os.path.exists(f"{ROOT}/{agent.machine}")
    assert agent.run("forget").returncode == 0
    again = EbpfTracker.attach(agent.machine, 0, device)
    assert again.fresh
    again.close()


def test_stop_while_the_process_server_is_away_is_clean(
    agent: Agent, loop_disk: MakeLoopDisk
) -> None:
    agent.protects(loop_disk(MIB).path)
    with subprocess.Popen(
        agent.command("run"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr
            line = ""
            while "ready" not in line:
                line = process.stderr.readline()
                assert line, "it ended"
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
            told = process.stderr.read()
            assert "Traceback" not in told
        finally:
            process.kill()
    assert (agent.state / str(agent.machine)).is_dir()


def test_state_on_a_protected_disk_is_refused(
    agent: Agent, loop_disk: MakeLoopDisk, tmp_path: Path
) -> None:
    disk = loop_disk(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", disk.path], check=True)
    agent.state.mkdir()
    subprocess.run(["mount", disk.path, str(agent.state)], check=True)
    try:
        agent.protects(disk.path)
        done = agent.run("run")
        assert done.returncode == 2
        assert "frozen for each point" in done.stdout + done.stderr
    finally:
        subprocess.run(["umount", "-l", str(agent.state)], check=False)


def test_disk_that_shrank_is_refused(agent: Agent, loop_disk: MakeLoopDisk, tmp_path: Path) -> None:

    disk = loop_disk(MIB)
    device = Device.open(disk.path)
    state = StreamStateFile(str(agent.state), agent.machine)
    state.save({0: BlockSet(MIB // BLOCK_BYTES)}, generation=1, identities={0: device.identity})
    device.close()
    os.truncate(disk.image, MIB // 2)
    subprocess.run(["losetup", "-c", disk.path], check=True)
    agent.protects(disk.path)
    done = agent.run("run")
    assert done.returncode == 7
    assert "shrank" in done.stdout + done.stderr

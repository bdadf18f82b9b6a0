"""A request that is under way at a swap belongs to both epochs, whether or not its end is told."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agents.mobility.device import Device
from agents.mobility.tracker.ebpf import EbpfTracker
from replication.block_set import BlockSet
from tests.agents.mobility.conftest import LoopDisk

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    from tests.agents.mobility.conftest import MakeLoopDisk

MIB = 1 << 20
FIFREEZE = 0xC0045877
FITHAW = 0xC0045878


class StalledStore:
    """A file system that can be stopped: writes to a loop device on it stay under way."""

    def __init__(self, device: str, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        subprocess.run(["mount", device, str(folder)], check=True)
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._stalled = False

    def stall(self) -> None:
        fcntl.ioctl(self._fd, FIFREEZE, 0)
        self._stalled = True

    def go_on(self) -> None:
        if self._stalled:
            fcntl.ioctl(self._fd, FITHAW, 0)
            self._stalled = False

    def close(self) -> None:
        self.go_on()
        os.close(self._fd)
        # The kernel lets go of a detached loop device's image when its last opener does.
        deadline = time.monotonic() + 10
        while subprocess.run(["umount", str(self.folder)], check=False).returncode:
            assert time.monotonic() < deadline, f"{self.folder} stays busy"
            time.sleep(0.1)


@pytest.fixture
def store(loop_disk: MakeLoopDisk, tmp_path: Path) -> Iterator[StalledStore]:
    with contextlib.closing(StalledStore(loop_disk(64 * MIB).path, tmp_path / "store")) as made:
        yield made


def test_a_write_that_a_swap_falls_into_is_in_both_epochs(
    store: StalledStore, machine: uuid.UUID
) -> None:
    image = store.folder / "disk.img"
    disk = LoopDisk(image, 16 * MIB)
    device = Device.open(disk.path)
    tracker = EbpfTracker.attach(machine, 0, device)
    mine = BlockSet(device.block_count)
    mine.add_run(77, 1)
    store.stall()
    writer = threading.Thread(target=disk.write, args=([77],))
    writer.start()
    try:
        _wait_until_under_way(device.name)
        assert tracker.swap() == mine
        tracker.forget()
        assert tracker.peek_running() == mine  # its data is not there yet: read it again
        assert tracker.swap() == mine
        tracker.forget()
        assert tracker.peek_running() == mine
        store.go_on()
        writer.join(10)
        assert tracker.swap() == mine
        tracker.forget()
        assert not tracker.peek_running()
        assert not tracker.swap()
    finally:
        store.go_on()
        writer.join(10)
        tracker.close()
        device.close()
        disk.detach()


def test_a_write_under_way_stays_known_where_the_kernel_does_not_count(
    store: StalledStore, machine: uuid.UUID
) -> None:
    disk = LoopDisk(store.folder / "disk.img", 16 * MIB)
    device = Device.open(disk.path)
    tracker = EbpfTracker.attach(machine, 0, device)
    Path(f"/sys/block/{device.name}/queue/iostats").write_text("0")
    mine = BlockSet(device.block_count)
    mine.add_run(77, 1)
    store.stall()
    writer = threading.Thread(target=disk.write, args=([77],))
    writer.start()
    try:
        deadline = time.monotonic() + 10
        while not tracker.peek_running():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert Path(f"/sys/block/{device.name}/inflight").read_text().split()[1] == "0"
        assert tracker.swap() == mine
        tracker.forget()
        assert tracker.peek_running() == mine
    finally:
        store.go_on()
        writer.join(10)
        Path(f"/sys/block/{device.name}/queue/iostats").write_text("1")
        tracker.close()
        device.close()
        disk.detach()


def _wait_until_under_way(name: str) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with open(f"/sys/block/{name}/inflight") as file:
            if int(file.read().split()[1]):
                return
        time.sleep(0.01)
    raise AssertionError("the write was never under way")

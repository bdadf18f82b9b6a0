"""SIGKILL at random moments, while a writer writes: every written block is found all the same."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from agents.mobility.tracker import pins
from agents.mobility.tracker.ebpf import EbpfTracker
from replication.block_set import BlockSet
from tests.agents.mobility.tracker import swap_until_killed

if TYPE_CHECKING:
    import uuid
    from pathlib import Path

    from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk, OpenDevice

MIB = 1 << 20
KILLS = 12


class Durable:
    """What the killed processes have written down, each in a file of its own."""

    def __init__(self, paths: list[Path], block_count: int) -> None:
        self.found = BlockSet(block_count)
        self.attached: list[str] = []
        self.epochs = 0
        for path in paths:
            self._read(path.read_bytes())

    def _read(self, data: bytes) -> None:
        position = 0
        while position + 5 <= len(data):
            kind, size_bytes = chr(data[position]), struct.unpack_from("<I", data, position + 1)[0]
            body = data[position + 5 : position + 5 + size_bytes]
            if len(body) < size_bytes:
                break
            if kind == "S":
                self.found |= BlockSet.from_bytes(body)
                self.epochs += 1
            else:
                self.attached.append(kind)
            position += 5 + size_bytes


class Writer(threading.Thread):
    """Writes random blocks until it is stopped; ``written`` are the completed ones."""

    def __init__(self, disk: LoopDisk, block_count: int) -> None:
        super().__init__()
        self._disk = disk
        self._block_count = block_count
        self.written: set[int] = set()
        self.stop = threading.Event()

    def run(self) -> None:
        chosen = random.Random(7)
        while not self.stop.wait(0.001):
            blocks = [chosen.randrange(self._block_count) for _ in range(10)]
            self._disk.write(blocks)
            self.written.update(blocks)


def start(machine: uuid.UUID, disk: LoopDisk, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, swap_until_killed.__file__, str(machine), disk.path, str(path)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def disk(loop_disk: MakeLoopDisk) -> LoopDisk:
    return loop_disk(128 * MIB)


def test_no_write_is_lost_to_kills_while_swapping(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice, tmp_path: Path
) -> None:
    device = open_device(disk.path)
    chosen = random.Random(3)
    paths = [tmp_path / f"found{kill}" for kill in range(KILLS)]
    EbpfTracker.attach(machine, 0, device).close()
    writer = Writer(disk, device.block_count)
    writer.start()
    try:
        for path in paths:
            process = start(machine, disk, path)
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "attached\n"
                time.sleep(chosen.uniform(0, 0.15))
            finally:
                process.kill()
                process.wait()
                if process.stdout is not None:
                    process.stdout.close()
    finally:
        writer.stop.set()
        writer.join()
    durable = Durable(paths, device.block_count)
    tracker = EbpfTracker.attach(machine, 0, device)
    found = durable.found | tracker.swap()
    tracker.close()
    written = BlockSet(device.block_count)
    for block in writer.written:
        written.add_run(block, 1)
    assert durable.epochs >= KILLS // 2
    assert len(written) > 1000
    assert not written - found
    assert not found - written
    assert durable.attached[-1] == "A"


def test_a_kill_during_attach_leaves_what_the_next_attach_mends(
    machine: uuid.UUID, disk: LoopDisk, open_device: OpenDevice, tmp_path: Path
) -> None:
    device = open_device(disk.path)
    chosen = random.Random(5)
    # Importing takes most of the time: begin to kill when the machine's folder appears.
    for kill in range(8):
        process = start(machine, disk, tmp_path / f"found{kill}")
        try:
            folder = f"{pins.ROOT}/{machine}"
            limit = time.monotonic() + 30
            while not os.path.exists(folder) and time.monotonic() < limit:
                time.sleep(0.0005)
            assert os.path.exists(folder)
            time.sleep(chosen.uniform(0, 0.04))
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        whole = set(os.listdir(folder)) >= set(pins.MACHINE_PINS)
        disk.write([kill])
        tracker = EbpfTracker.attach(machine, 0, device)
        assert tracker.fresh or whole
        disk.write([100 + kill])
        assert 100 + kill in tracker.swap()
        tracker.remove()
        assert not os.path.exists(folder)

"""Real disks for the agent's tests: loop devices over images, taken down whatever happens."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import uuid
from typing import TYPE_CHECKING, Protocol

import pytest

from agents.mobility.device import Device
from agents.mobility.tracker.pins import remove_machine
from replication.block_set import BLOCK_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


class LoopDisk:
    """A loop device over a sparse image."""

    def __init__(self, image: Path, size_bytes: int, *options: str) -> None:
        self.image = image
        with open(image, "wb") as file:
            file.truncate(size_bytes)
        command = ["losetup", "-f", "--show", *options, str(image)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        self.path = done.stdout.strip()

    def detach(self) -> None:
        subprocess.run(["losetup", "-d", self.path], check=False)

    def write(self, blocks: Iterable[int], fill: bytes = b"x") -> None:
        """Write blocks one by one past the page cache; each is complete when this returns."""
        fd = os.open(self.path, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, BLOCK_BYTES) as page:
                page[:] = fill * BLOCK_BYTES
                for block in blocks:
                    assert os.pwrite(fd, page, block * BLOCK_BYTES) == BLOCK_BYTES
        finally:
            os.close(fd)


class MakeLoopDisk(Protocol):
    def __call__(self, size_bytes: int, *options: str) -> LoopDisk: ...


@pytest.fixture
def loop_disk(tmp_path: Path) -> Iterator[MakeLoopDisk]:
    """Makes loop devices of a size, with options for losetup."""
    with contextlib.ExitStack() as made:

        def make(size_bytes: int, *options: str) -> LoopDisk:
            disk = LoopDisk(tmp_path / f"{uuid.uuid4()}.img", size_bytes, *options)
            made.callback(disk.detach)
            return disk

        yield make


@pytest.fixture
def opened() -> Iterator[contextlib.ExitStack]:
    """Closes what a test has opened, before its loop devices go."""
    with contextlib.ExitStack() as stack:
        yield stack


class OpenDevice(Protocol):
    def __call__(self, path: str) -> Device: ...


@pytest.fixture
def open_device(
    loop_disk: MakeLoopDisk,  # must outlive the devices
    opened: contextlib.ExitStack,
) -> OpenDevice:
    """Opens devices that are closed before the loop devices are detached."""

    def open_(path: str) -> Device:
        device = Device.open(path)
        opened.callback(device.close)
        return device

    return open_


@pytest.fixture
def machine() -> Iterator[uuid.UUID]:
    """A machine of its own, whose pins are gone afterwards."""
    made = uuid.uuid4()
    try:
        yield made
    finally:
        remove_machine(made)

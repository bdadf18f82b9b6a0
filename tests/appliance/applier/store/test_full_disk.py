import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.applier.store import MachineStore, ReaderStore
from appliance.applier.store.block_map import ANONYMOUS_BYTES_MAX, _memory
from appliance.applier.store.pins import lowest_pin
from replication.errors import StorageError
from tests.appliance.applier.store.recorded_machine import (
    BLOCK,
    MACHINE,
    RecordedMachine,
    assert_equals_images,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    subprocess.run(command, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def write_without_end(store: MachineStore) -> None:
    with store.begin() as writer:
        for order in range(1000):
            writer.write(0, 0, order, b"x" * 16 * BLOCK)


def fill(path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(1000):
            file.write(bytes(BLOCK))


def test_a_full_disk_refuses_the_changeset_and_keeps_the_rest(small_disk: Path) -> None:
    machine = RecordedMachine(str(small_disk))
    with machine.open() as store:
        machine.apply(store)
        with pytest.raises(StorageError, match="the disk is full"):
            write_without_end(store)
        assert store.head is not None
        assert store.head.position == 1
        assert_equals_images(store, machine)
        machine.apply(store)
        assert_equals_images(store, machine)


def test_a_disk_that_fills_while_merging_and_folding_loses_nothing(small_disk: Path) -> None:
    machine = RecordedMachine(str(small_disk))
    with machine.open() as store:
        for _ in range(3):
            machine.apply(store, writes=5)
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space"):
            fill(filler)
        with pytest.raises(StorageError):
            store.merge(1, 3)
        with pytest.raises(StorageError):
            store.fold_to(3)
        filler.unlink()
        assert_equals_images(store, machine)
        store.fold_to(2)
        machine.apply(store)
        assert_equals_images(store, machine)
    with machine.open() as store:
        assert_equals_images(store, machine)


APPLY_AND_DIE = """
import os, signal, sys
from tests.appliance.applier.store.recorded_machine import RecordedMachine
machine = RecordedMachine(sys.argv[1])
store = machine.open()
for _ in range(3):
    machine.apply(store)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def small_xfs(tmp_path: Path) -> Iterator[Path]:
    """XFS, which refuses to make files on a full disk: SQLite's log among them."""
    image, folder = tmp_path / "xfs.img", tmp_path / "xfs"
    image.touch()
    os.truncate(image, 320 << 20)
    folder.mkdir()
    subprocess.run(["mkfs.xfs", "-q", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def take_all(folder: Path) -> None:
    """Leave no room in a file system."""
    with (folder / "filler").open("wb", buffering=0) as file:
        for piece_bytes in (1 << 20, 4096, 512):
            try:
                while True:
                    at = file.seek(0, os.SEEK_END)
                    os.posix_fallocate(file.fileno(), at, piece_bytes)
            except OSError:
                continue


@pytest.mark.parametrize("killed", [True, False])
def test_points_on_a_full_disk_can_be_read_and_the_reason_is_told(
    small_xfs: Path, killed: bool
) -> None:
    root = small_xfs / "store"
    if killed:
        subprocess.run([sys.executable, "-c", APPLY_AND_DIE, str(root)], check=False)
    else:
        machine = RecordedMachine(str(root))
        with machine.open() as store:
            for _ in range(3):
                machine.apply(store)
    take_all(small_xfs)
    reader = ReaderStore(str(root), MACHINE)
    for _ in range(3):
        points = reader.points()
        assert len(points) == 3
        with reader.open_view(points[-1].position, 0) as view:
            assert len(view.read(0, BLOCK)) == BLOCK
            assert lowest_pin(os.path.join(reader.folder, "pins")) is not None
        assert lowest_pin(os.path.join(reader.folder, "pins")) is None
    with pytest.raises(StorageError, match="No space left"):
        MachineStore.open(str(root), MACHINE)


def test_map_of_a_view_never_lies_where_there_is_no_room(small_disk: Path) -> None:
    """Else the process would be ended by a signal at its first write into it."""
    memory = _memory(ANONYMOUS_BYTES_MAX + BLOCK, str(small_disk))
    memory[:: 1 << 20] = 1
    assert int(memory.sum()) == -(-len(memory) // (1 << 20))
    assert list(small_disk.iterdir()) == []

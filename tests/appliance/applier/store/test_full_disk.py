import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.applier.store import MachineStore
from replication.errors import StorageError
from tests.appliance.applier.store.recorded_machine import (
    BLOCK,
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

import os
from pathlib import Path

import pytest

from appliance.applier.scrub import Scrub
from appliance.applier.store import MachineStore, RottenBlockError
from appliance.applier.store.layer_format import HEADER_BYTES
from replication.bookmark import Bookmark, Consistency, Stamp
from replication.errors import IntegrityError
from tests.appliance.applier.store.recorded_machine import (
    BLOCK,
    MACHINE,
    RecordedMachine,
    assert_equals_images,
)


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ mask]))


@pytest.fixture
def machine(tmp_path: Path) -> RecordedMachine:
    made = RecordedMachine(str(tmp_path), sizes=(40,))
    with made.open() as store:
        for _ in range(4):
            made.apply(store, writes=6)
        with store.begin() as writer:  # block 7 is known to be data of the newest layer
            made.number += 1
            image = bytearray(made.images[4][0])
            image[7 * BLOCK : 8 * BLOCK] = b"\x55" * BLOCK
            writer.write(0, 7, 0, b"\x55" * BLOCK)
            made.images[5] = {0: bytes(image)}
            bookmark = Bookmark(Stamp(1, made.number), 1, Consistency.CRASH)
            made.position = writer.seal(bookmark, made.number - 1, made.attempt, made.shapes())
    return made


def layer_of(store: MachineStore, position: int) -> Path:
    row = next(row for row in store.chain().layers if row.last == position)
    return Path(store.folder, row.file)


def assert_refused(store: MachineStore, position: int, block: int, file: str) -> None:
    with store.open_view(position, 0) as view:
        with pytest.raises(RottenBlockError) as caught:
            view.read(0, view.size_bytes)
        for word in (str(MACHINE), f"block {block}", "disk 0", file):
            assert word in str(caught.value)
        good = [b for b in range(40) if b != block]
        assert all(len(view.read(b * BLOCK, BLOCK)) == BLOCK for b in good)


def test_a_flip_in_a_layer_is_refused_reported_and_healed(machine: RecordedMachine) -> None:
    with machine.open() as store:
        path = layer_of(store, 5)
        flip(path, HEADER_BYTES + 100)
        assert_refused(store, 5, 7, path.name)
        (damage,) = store.verify()
        assert (damage.disk, damage.block, damage.offset) == (0, 7, HEADER_BYTES)
        assert store.damages() == [damage]
        assert store.points()[-1].verified_ns is None
        assert store.heal(0, 7, b"other" * 819 + b"!") == 0
        assert store.heal(0, 7, b"\x55" * BLOCK) == 1
        assert store.damages() == []
        assert store.verify() == []
        assert store.points()[-1].verified_ns is not None
        assert_equals_images(store, machine)


def test_a_flip_outlives_merging_and_folding_and_can_still_be_healed(
    machine: RecordedMachine,
) -> None:
    with machine.open() as store:
        flip(layer_of(store, 5), HEADER_BYTES)
        store.merge(4, 5)
        assert [damage.file for damage in store.damages()] == [
            "layers/000000000004-000000000005.layer"
        ]
        assert_refused(store, 5, 7, "000000000004-000000000005.layer")
        store.fold_to(5)
        assert [damage.file for damage in store.damages()] == ["disks/0/base.img"]
        assert_refused(store, 5, 7, "base.img")
        assert store.heal(0, 7, b"\x55" * BLOCK) == 1
        assert_equals_images(store, machine)


@pytest.mark.parametrize("zeros", [False, True])
def test_what_was_rotten_in_the_base_is_not_healed_over_what_a_fold_has_put_there(
    machine: RecordedMachine, *, zeros: bool
) -> None:
    with machine.open() as store:
        store.fold_to(5)
        flip(Path(store.folder, "disks/0/base.img"), 7 * BLOCK)
        assert [damage.block for damage in store.verify()] == [7]
        second = put(machine, store, b"" if zeros else b"\x66" * BLOCK)
        store.fold_to(second)
        assert store.damages() == []
        put(machine, store, b"\x55" * BLOCK)  # as it was
        assert store.heal(0, 7, b"\x55" * BLOCK) == 0
        assert store.verify(second) == []
        assert_equals_images(store, machine)


def put(machine: RecordedMachine, store: MachineStore, data: bytes) -> int:
    """A changeset of block 7 alone; no data: zeros."""
    image = bytearray(machine.images[machine.position][0])
    image[7 * BLOCK : 8 * BLOCK] = data or bytes(BLOCK)
    with store.begin() as writer:
        if data:
            writer.write(0, 7, 0, data)
        else:
            writer.zero(0, 7, 1, 0)
        machine.number += 1
        machine.images[machine.position + 1] = {0: bytes(image)}
        bookmark = Bookmark(Stamp(1, machine.number), machine.number, Consistency.CRASH)
        machine.position = writer.seal(
            bookmark, machine.number - 1, machine.attempt, machine.shapes()
        )
    return machine.position


@pytest.mark.parametrize("name", ["base.img", "base.digest"])
def test_a_flip_in_the_base_is_refused_and_reported(machine: RecordedMachine, name: str) -> None:
    with machine.open() as store:
        store.fold_to(5)
        unit = BLOCK if name == "base.img" else 16
        flip(Path(store.folder, "disks/0", name), 7 * unit + 3)
        assert_refused(store, 5, 7, "base.img")
        assert [damage.block for damage in store.verify()] == [7]


def test_a_lost_page_of_digests_never_makes_data_look_like_zeros(
    machine: RecordedMachine,
) -> None:
    with machine.open() as store:
        store.fold_to(5)
        digests = Path(store.folder, "disks/0/base.digest")
        os.truncate(digests, 0)
        os.truncate(digests, 40 * 16)
        data = {n for n in range(40) if any(machine.images[5][0][n * BLOCK : (n + 1) * BLOCK])}
        assert {damage.block for damage in store.verify()} == data
        assert_refused_everywhere(store, data)


def assert_refused_everywhere(store: MachineStore, blocks: set[int]) -> None:
    with store.open_view(5, 0) as view:
        for block in blocks:
            with pytest.raises(RottenBlockError):
                view.read(block * BLOCK, BLOCK)


@pytest.mark.parametrize("name", ["base.img", "base.digest"])
def test_a_lost_file_of_the_base_is_refused_and_never_made_anew(
    machine: RecordedMachine, name: str
) -> None:
    with machine.open() as store:
        store.fold_to(4)
        path = Path(store.folder, "disks/0", name)
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(IntegrityError, match=name):
            store.open_view(5, 0)
        with pytest.raises(IntegrityError, match=name):
            store.fold_to(5)
        assert store.chain().folding_to is None
        assert [damage.file for damage in store.verify()] == [f"disks/0/{name}"]
        path.write_bytes(content)
        store.fold_to(5)
        assert_equals_images(store, machine)


@pytest.mark.parametrize("left_bytes", [0, 64])
def test_a_base_whose_two_files_are_cut_is_refused_and_not_zeros(
    machine: RecordedMachine, left_bytes: int
) -> None:
    with machine.open() as store:
        store.fold_to(4)
        paths = [Path(store.folder, "disks/0", name) for name in ("base.img", "base.digest")]
        whole = [path.read_bytes() for path in paths]
        for path in paths:
            os.truncate(path, left_bytes)
        with pytest.raises(IntegrityError, match="at the newest fold"):
            store.open_view(5, 0)
        with pytest.raises(IntegrityError, match="at the newest fold"):
            store.fold_to(5)
        assert {damage.file for damage in store.verify()} == {
            "disks/0/base.img",
            "disks/0/base.digest",
        }
        for path, content in zip(paths, whole, strict=True):
            path.write_bytes(content)
        store.fold_to(5)
        assert_equals_images(store, machine)
    with machine.open() as store:
        assert_equals_images(store, machine)


@pytest.mark.parametrize("name", ["base.img", "base.digest"])
def test_the_scrub_finds_every_block_of_a_base_file_that_is_empty(
    machine: RecordedMachine, name: str
) -> None:
    with machine.open() as store:
        store.fold_to(5)
        os.truncate(Path(store.folder, "disks/0", name), 0)
        scrub, found = Scrub(), set()
        for _ in range(2):  # it begins anywhere
            _, findings = scrub.run(store, 1 << 30)
            found |= {finding.run.block for finding in findings}
        image = machine.images[5][0]
        assert found == {n for n in range(40) if any(image[n * BLOCK : (n + 1) * BLOCK])}


def test_data_in_a_hole_of_the_base_is_found(machine: RecordedMachine) -> None:
    with machine.open() as store:
        store.fold_to(5)
        image = machine.images[5][0]
        hole = next(n for n in range(40) if not any(image[n * BLOCK : (n + 1) * BLOCK]))
        with Path(store.folder, "disks/0/base.img").open("r+b") as file:
            file.seek(hole * BLOCK)
            file.write(b"stray")
        assert [damage.block for damage in store.verify()] == [hole]


@pytest.mark.parametrize("where", ["header", "index", "gone"])
def test_an_unusable_layer_is_reported_and_never_folded(
    machine: RecordedMachine, where: str
) -> None:
    with machine.open() as store:
        path = layer_of(store, 2)
        if where == "header":
            flip(path, 40)
        elif where == "index":
            flip(path, path.stat().st_size - 200)
        else:
            path.unlink()
        for call in (
            lambda: store.open_view(3, 0),
            lambda: store.fold_to(2),
            lambda: store.merge(2, 3),
        ):
            with pytest.raises(IntegrityError):
                call()
        assert store.chain().folding_to is None
        assert [damage.file for damage in store.verify()] == [f"layers/{path.name}"]
    with machine.open() as store, store.open_view(1, 0) as view:
        assert view.read(0, view.size_bytes) == machine.images[1][0]

import os
import random
import uuid
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.applier.store.extents import ZERO, Extents, key_of, overlay, overlay_all, resolve
from appliance.applier.store.layer_format import HEADER_BYTES
from appliance.applier.store.layer_reader import Layer
from appliance.applier.store.layer_writer import LayerFile
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.checksum import block_digests
from replication.errors import IntegrityError, ReplicationError

BLOCK = 4096
BLOCKS = 40
BOOKMARK = Bookmark(Stamp(3, 9), 1_795_000_000_123_456_789, Consistency.APP, "asked for more")
SHAPES = [DiskShape(0, "sda", BLOCKS * BLOCK), DiskShape(5, "dåta", 512)]

runs = st.tuples(st.integers(0, 2), st.integers(0, BLOCKS - 1), st.integers(1, 12), st.booleans())


def write_layer(path: Path, rows: list[tuple[int, int, int, int]], data: bytes) -> Layer:
    target = LayerFile(str(path))
    try:
        if data:
            target.append(data)
        target.finish(
            Extents.of(rows),
            machine=uuid.UUID(int=1),
            first=4,
            last=8,
            parent=Stamp(2, 7),
            bookmark=BOOKMARK,
            attempt=b"x" * 16,
            applied_ns=17,
            disks=SHAPES,
        )
    finally:
        target.close()
    return Layer.open(str(path))


@given(st.lists(runs, max_size=30))
@settings(max_examples=300, deadline=None)
def test_newest_run_wins_in_every_block(rows: list[tuple[int, int, int, bool]]) -> None:
    wanted: dict[int, int] = {}
    start, counts, data = [], [], []
    for nth, (disk, block, count, is_zero) in enumerate(rows):
        start.append(key_of(disk, block))
        counts.append(count)
        data.append(ZERO if is_zero else nth * 100)
        for step in range(count):
            wanted[key_of(disk, block) + step] = ZERO if is_zero else nth * 100 + step
    starts, lengths, numbers = (np.array(part, np.int64) for part in (start, counts, data))
    backwards = np.arange(len(rows))[::-1]
    found = resolve(starts[backwards], lengths[backwards], numbers[backwards], backwards)
    assert found.is_well_formed()
    assert blocks_of(found) == wanted
    singles = [
        Extents(starts[n : n + 1], lengths[n : n + 1], numbers[n : n + 1]) for n in range(len(rows))
    ]
    assert blocks_of(overlay_all(singles)) == wanted


def blocks_of(extents: Extents) -> dict[int, int]:
    found: dict[int, int] = {}
    for start, count, data in zip(
        extents.start.tolist(), extents.count.tolist(), extents.data.tolist(), strict=True
    ):
        for step in range(count):
            assert start + step not in found
            found[start + step] = ZERO if data == ZERO else data + step
    return found


@given(st.lists(runs, max_size=12), st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_layer_reads_back_what_was_written(
    rows: list[tuple[int, int, int, bool]], seed: int
) -> None:
    extents = Extents.empty()
    total = 0
    for disk, block, count, is_zero in rows:
        extents = overlay(extents, Extents.of([(disk, block, count, ZERO if is_zero else total)]))
        total += 0 if is_zero else count
    given_rows = list(
        zip(
            extents.disk.tolist(),
            extents.block.tolist(),
            extents.count.tolist(),
            extents.data.tolist(),
            strict=True,
        )
    )
    data = random.Random(seed).randbytes(total * BLOCK)
    path = Path(f"/dev/shm/understudy-layer-{os.getpid()}")
    try:
        with write_layer(path, given_rows, data) as layer:
            header = layer.header
            assert (header.first, header.last, header.parent) == (4, 8, Stamp(2, 7))
            assert header.bookmark == BOOKMARK
            assert list(header.disks) == SHAPES
            assert blocks_of(layer.check_whole()) == blocks_of(extents)
            assert bytes(layer.digests()) == block_digests(data)
            found = bytearray(len(data))
            layer.read_into(0, memoryview(found))
            assert found == data
    finally:
        path.unlink(missing_ok=True)


@pytest.fixture
def small_layer(tmp_path: Path) -> bytes:
    path = tmp_path / "small.layer"
    rows = [(0, 1, 2, 0), (0, 9, 3, ZERO), (5, 0, 1, 2)]
    write_layer(path, rows, bytes(range(1, 13)) * (BLOCK // 4)).close()
    return path.read_bytes()


def read_whole(path: Path) -> bytes:
    with Layer.open(str(path)) as layer:
        layer.check_whole()
        found = bytearray(layer.header.data_blocks * BLOCK)
        layer.read_into(0, memoryview(found))
        if block_digests(found) != bytes(layer.digests()):
            raise IntegrityError("data")
        return bytes(found)


def test_any_flipped_byte_is_an_integrity_error(tmp_path: Path, small_layer: bytes) -> None:
    path = tmp_path / "flipped.layer"
    data_end = HEADER_BYTES + 3 * BLOCK
    places = [*range(512), *range(512, data_end, 61), *range(data_end, len(small_layer))]
    for place in places:
        flipped = bytearray(small_layer)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError):
            read_whole(path)


def test_a_layer_cut_anywhere_is_an_integrity_error(tmp_path: Path, small_layer: bytes) -> None:
    path = tmp_path / "cut.layer"
    for length in [*range(0, len(small_layer), 97), len(small_layer) - 1]:
        path.write_bytes(small_layer[:length])
        with pytest.raises(IntegrityError):
            read_whole(path)


@given(st.binary(max_size=5000))
@settings(max_examples=100, deadline=None)
def test_rubbish_is_a_named_error(rubbish: bytes) -> None:
    path = Path(f"/dev/shm/understudy-rubbish-{os.getpid()}")
    try:
        path.write_bytes(rubbish)
        with pytest.raises(ReplicationError):
            read_whole(path)
    finally:
        path.unlink(missing_ok=True)

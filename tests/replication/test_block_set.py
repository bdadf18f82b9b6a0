import itertools
import os
import struct
import tracemalloc

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from replication.block_set import (
    BLOCK_BYTES,
    BLOCK_COUNT_MAX,
    RUN_WINDOW_BLOCKS,
    BlockSet,
    block_count_of,
)
from replication.errors import IntegrityError, PeerError
from tests.replication.samples import quick

HEADER_BYTES = 40

counts = st.one_of(
    st.integers(0, 600),
    st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 4095, 4097]),
)


@st.composite
def sets(draw: st.DrawFn, block_count: int | None = None) -> tuple[BlockSet, set[int]]:
    """A block set made by random operations, and the python set that it must equal."""
    count = draw(counts) if block_count is None else block_count
    made, model = BlockSet(count), set[int]()
    for _ in range(draw(st.integers(0, 8))):
        block = draw(st.integers(0, count))
        size = draw(st.integers(0, count - block))
        run = set(range(block, block + size))
        if draw(st.booleans()):
            made.add_run(block, size)
            model |= run
        else:
            made.discard_run(block, size)
            model -= run
    return made, model


def blocks_of(made: BlockSet) -> set[int]:
    return {block for first, count in made.runs() for block in range(first, first + count)}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[tuple[BlockSet, set[int]], tuple[BlockSet, set[int]]]:
    count = draw(counts)
    return draw(sets(count)), draw(sets(count))


@quick
@given(sets())
def test_set_equals_its_model(pair: tuple[BlockSet, set[int]]) -> None:
    made, model = pair
    assert len(made) == len(model)
    assert bool(made) == bool(model)
    assert blocks_of(made) == model
    around = range(-2, made.block_count + 70)
    assert {block for block in around if block in made} == model


@quick
@given(pairs())
def test_algebra_equals_that_of_the_models(
    both: tuple[tuple[BlockSet, set[int]], tuple[BlockSet, set[int]]],
) -> None:
    (one, one_model), (other, other_model) = both
    before = one.copy()
    assert blocks_of(one | other) == one_model | other_model
    assert blocks_of(one - other) == one_model - other_model
    assert blocks_of(one & other) == one_model & other_model
    assert one == before
    assert (one == other) == (one_model == other_model)


@quick
@given(sets())
def test_runs_ascend_and_are_as_long_as_can_be(pair: tuple[BlockSet, set[int]]) -> None:
    runs = list(pair[0].runs())
    assert all(count > 0 for _, count in runs)
    assert all(a + n < b for (a, n), (b, _) in itertools.pairwise(runs))


def test_runs_are_cut_at_windows_only() -> None:
    blocks = 3 * RUN_WINDOW_BLOCKS + 5
    assert list(BlockSet.full(blocks).runs()) == [
        (0, RUN_WINDOW_BLOCKS),
        (RUN_WINDOW_BLOCKS, RUN_WINDOW_BLOCKS),
        (2 * RUN_WINDOW_BLOCKS, RUN_WINDOW_BLOCKS),
        (3 * RUN_WINDOW_BLOCKS, 5),
    ]
    around = BlockSet(blocks)
    around.add_run(RUN_WINDOW_BLOCKS - 3, 7)
    assert list(around.runs()) == [(RUN_WINDOW_BLOCKS - 3, 3), (RUN_WINDOW_BLOCKS, 4)]


@quick
@given(sets())
def test_bytes_and_bitmap_round_trip(pair: tuple[BlockSet, set[int]]) -> None:
    made, _ = pair
    assert BlockSet.from_bytes(made.to_bytes()) == made
    assert BlockSet.from_bitmap(made.to_bitmap(), made.block_count) == made
    assert len(made.to_bitmap()) == -(-made.block_count // 64) * 8


@quick
@given(st.integers(0, 300), st.binary(min_size=38, max_size=64))
def test_bits_of_a_kernel_bitmap_behind_the_end_are_dropped(count: int, bitmap: bytes) -> None:
    bits = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")[:count]
    made = BlockSet.from_bitmap(bitmap, count)
    assert blocks_of(made) == set(np.flatnonzero(bits).tolist())
    assert len(made) == int(bits.sum())


def test_full_set_has_every_block_and_a_short_last_one_counts() -> None:
    for count in (0, 1, 63, 64, 65, 1001):
        assert len(BlockSet.full(count)) == count
    assert [block_count_of(size) for size in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
    assert block_count_of(BLOCK_COUNT_MAX * BLOCK_BYTES) == BLOCK_COUNT_MAX


def test_what_is_outside_the_disk_is_refused() -> None:
    made = BlockSet(10)
    for block, count in ((-1, 1), (0, 11), (10, 1), (3, -1)):
        with pytest.raises(PeerError, match="outside"):
            made.add_run(block, count)
    with pytest.raises(PeerError, match="too short"):
        made.add_bitmap(b"\xff")
    with pytest.raises(PeerError, match="different sizes"):
        made |= BlockSet(11)
    for count in (-1, BLOCK_COUNT_MAX + 1):
        with pytest.raises(PeerError):
            BlockSet(count)


def test_no_flipped_bit_alters_the_set_and_every_cut_is_noticed() -> None:
    made = BlockSet(1001)
    made.add_run(3, 200)
    made.add_run(990, 11)
    whole = made.to_bytes()
    for bit in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = BlockSet.from_bytes(bytes(flipped))
        except (PeerError, IntegrityError):
            continue
        # zstd's own frame has bits that say nothing; everything else has to be noticed.
        assert bit // 8 >= HEADER_BYTES
        assert found == made
    for size in range(len(whole)):
        with pytest.raises((PeerError, IntegrityError)):
            BlockSet.from_bytes(whole[:size])
    with pytest.raises((PeerError, IntegrityError)):
        BlockSet.from_bytes(whole + b"\0")


@quick
@given(st.binary(max_size=200))
@example(b"USB1\x01" + bytes(35))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises((PeerError, IntegrityError)):
        BlockSet.from_bytes(garbage)


def record(block_count: int, bitmap: bytes, body: bytes) -> bytes:
    head = struct.pack("<4sB3xQ", b"USB1", 1, block_count)
    return head + struct.pack("<Q", len(body)) + xxhash.xxh3_128_digest(head + bitmap) + body


def test_bits_behind_the_end_are_refused_in_a_record() -> None:
    bitmap = b"\xff" * 8
    body = zstandard.ZstdCompressor().compress(bitmap)
    assert len(BlockSet.from_bytes(record(64, bitmap, body))) == 64
    with pytest.raises(PeerError, match="behind the end"):
        BlockSet.from_bytes(record(63, bitmap, body))


def test_bytes_behind_the_zstd_frame_are_refused() -> None:
    body = zstandard.ZstdCompressor().compress(bytes(8)) + b"more"
    with pytest.raises(IntegrityError):
        BlockSet.from_bytes(record(64, bytes(8), body))


def test_unknown_or_false_content_size_is_refused() -> None:
    unknown = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(8))
    longer = zstandard.ZstdCompressor().compress(bytes(16))
    for body in (unknown, longer):
        with pytest.raises(PeerError, match="unpacks to"):
            BlockSet.from_bytes(record(64, bytes(8), body))


def test_small_record_that_declares_a_huge_disk_takes_no_memory() -> None:
    # A zstd frame header that declares 8 GiB of content, and nothing behind it.
    body = b"\x28\xb5\x2f\xfd\xe0" + (BLOCK_COUNT_MAX // 8).to_bytes(8, "little") + os.urandom(40)
    assert zstandard.frame_content_size(body) == BLOCK_COUNT_MAX // 8
    tracemalloc.start()
    try:
        with pytest.raises(PeerError):
            BlockSet.from_bytes(record(BLOCK_COUNT_MAX, b"", body))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@quick
@given(sets(), st.integers(0, 700), st.integers(0, 20))
def test_first_blocks_are_the_lowest_in_so_many_runs(
    pair: tuple[BlockSet, set[int]], count: int, runs_max: int
) -> None:
    made, model = pair
    runs = list(made.runs())
    assert made.run_count() == len(runs)
    assert blocks_of(made.first(count)) == set(sorted(model)[:count])
    taken = made.first(count, runs_max)
    within = [block for first, size in runs[:runs_max] for block in range(first, first + size)]
    assert blocks_of(taken) == set(within[:count])
    assert taken.run_count() <= runs_max

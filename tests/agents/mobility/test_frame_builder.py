"""What is cut into frames comes out of the frames again, whatever the disk looks like."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.mobility.frame_builder import (
    FRAME_BLOCKS,
    FrameContent,
    contents,
    zero_blocks,
    zero_contents,
)
from replication.extent import COUNT_MAX
from replication.frame import EXTENT_COUNT_MAX, FRAME_BYTES_MAX, PLAIN_BYTES_MAX
from replication.manifest import SEGMENT_BYTES_MAX
from tests.agents.mobility.replica import BLOCK, Received, Replica

DISK_BLOCKS = 1100


def disk_of(seed: int, zero_runs: list[tuple[int, int]]) -> bytes:
    data = bytearray(np.random.default_rng(seed).bytes(DISK_BLOCKS * BLOCK))
    for block, count in zero_runs:
        end = min(block + count, DISK_BLOCKS)
        data[block * BLOCK : end * BLOCK] = bytes((end - block) * BLOCK)
    return bytes(data)


def runs_of(blocks: set[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in sorted(blocks):
        if runs and sum(runs[-1]) == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


def sent(frames: Iterator[FrameContent], segment_bytes: int = 2 << 20) -> Received:
    replica = Replica({3: DISK_BLOCKS * BLOCK})
    try:
        builder, received = replica.builder(segment_bytes)
        for frame in frames:
            assert len(frame.extents) <= EXTENT_COUNT_MAX
            assert sum(len(piece) for piece in frame.pieces) == frame.data_bytes
            assert frame.data_bytes <= PLAIN_BYTES_MAX
            builder.add(frame)
        builder.finish()
        assert builder.entries == received.entries
        assert builder.sent_bytes == sum(entry.size_bytes for entry in received.entries)
        blocks = sum(extent.count for _, extent, _ in received.extents)
        assert builder.changed_blocks == blocks
        return received
    finally:
        replica.close()


runs = st.lists(
    st.tuples(st.integers(0, DISK_BLOCKS - 1), st.integers(1, 400)), min_size=1, max_size=12
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), zeros=runs, wanted=runs, single=st.integers(1, 7))
def test_any_runs_of_any_disk_come_out_exactly(
    seed: int, zeros: list[tuple[int, int]], wanted: list[tuple[int, int]], single: int
) -> None:
    disk = disk_of(seed, zeros)
    blocks = {
        at for block, count in wanted for at in range(block, min(block + count, DISK_BLOCKS))
    } | set(range(0, DISK_BLOCKS, single * 50))

    def read(block: int, count: int) -> bytes:
        assert 0 < count <= FRAME_BLOCKS
        return disk[block * BLOCK : (block + count) * BLOCK]

    received = sent(contents(3, runs_of(blocks), read))
    assert received.blocks(3) == blocks
    ends = [extent.block for _, extent, _ in received.extents]
    assert ends == sorted(ends)
    for _, extent, data in received.extents:
        piece = disk[extent.block * BLOCK : extent.end * BLOCK]
        assert extent.zero == (not any(piece))
        assert data == (b"" if extent.zero else piece)


def test_scattered_blocks_fill_frames_to_the_brim() -> None:
    disk = disk_of(1, [])
    blocks = set(range(0, DISK_BLOCKS, 2))
    frames = list(
        contents(3, runs_of(blocks), lambda block, count: disk[block * BLOCK :][: count * BLOCK])
    )
    assert [frame.data_bytes for frame in frames[:-1]] == [PLAIN_BYTES_MAX] * (len(frames) - 1)
    assert sent(iter(frames)).blocks(3) == blocks


def test_every_second_block_zero_keeps_to_the_extent_limit() -> None:
    data = (b"x" * BLOCK + bytes(BLOCK)) * (DISK_BLOCKS // 2)
    runs_ = [(0, DISK_BLOCKS)]
    received = sent(contents(3, runs_, lambda block, count: data[block * BLOCK :][: count * BLOCK]))
    image = {3: bytearray(b"?" * len(data))}
    received.apply(image)
    assert bytes(image[3]) == data


def test_huge_holes_cost_next_to_nothing() -> None:
    total = (1 << 36) - 10
    windows = [(first, min(1 << 18, total - first)) for first in range(0, 1 << 28, 1 << 18)]
    windows.append((1 << 28, total - (1 << 28)))
    frames = list(zero_contents(0, windows))
    assert len(frames) == 1
    extents = frames[0].extents
    assert len(extents) <= total // COUNT_MAX + 1 + len(windows) // 16
    assert extents[0].block == 0
    assert extents[-1].end == total
    assert all(a.end == b.block for a, b in pairwise(extents))
    assert all(extent.zero and extent.count <= COUNT_MAX for extent in extents)
    scattered = list(zero_contents(0, [(block, 1) for block in range(0, 5000, 2)]))
    assert [len(frame.extents) for frame in scattered] == [1024, 1024, 452]


@pytest.mark.parametrize("segment_bytes", [2 << 20, SEGMENT_BYTES_MAX - (2 << 20)])
def test_segments_are_cut_below_the_limit(segment_bytes: int) -> None:
    noise = np.random.default_rng(5).bytes(FRAME_BLOCKS * BLOCK)
    count = segment_bytes // PLAIN_BYTES_MAX * 2 + 3
    frames = (
        content
        for _ in range(count)
        for content in contents(3, [(0, FRAME_BLOCKS)], lambda block, blocks: noise)
    )
    received = sent(frames, segment_bytes)
    assert received.frame_count == count
    assert len(received.entries) >= 2
    for entry in received.entries[:-1]:
        assert segment_bytes <= entry.size_bytes < segment_bytes + FRAME_BYTES_MAX
        assert entry.size_bytes <= SEGMENT_BYTES_MAX


def test_later_frame_wins() -> None:
    old, new = b"o" * BLOCK, b"n" * BLOCK
    frames = [
        *contents(3, [(5, 1)], lambda block, count: old),
        *contents(3, [(5, 1)], lambda block, count: new),
    ]
    received = sent(iter(frames))
    image = {3: bytearray(DISK_BLOCKS * BLOCK)}
    received.apply(image)
    assert bytes(image[3][5 * BLOCK : 6 * BLOCK]) == new


def test_one_bit_keeps_a_block_from_being_zero() -> None:
    data = bytearray(3 * BLOCK)
    data[2 * BLOCK - 1] = 1
    assert zero_blocks(data).tolist() == [True, False, True]

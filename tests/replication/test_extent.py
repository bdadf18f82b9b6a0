import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.block_set import BLOCK_COUNT_MAX
from replication.errors import PeerError
from replication.extent import Extent, pack_extents, unpack_extents
from tests.replication.samples import extent_lists, quick


@quick
@given(extent_lists())
def test_table_round_trips(extents: tuple[Extent, ...]) -> None:
    table = pack_extents(extents)
    assert len(table) == 16 * len(extents)
    assert unpack_extents(table) == extents
    assert unpack_extents(memoryview(table)) == extents


@quick
@given(st.binary(max_size=160))
def test_any_bytes_are_a_sound_table_or_refused(garbage: bytes) -> None:
    try:
        extents = unpack_extents(garbage)
    except PeerError:
        return
    end = 0
    for extent in extents:
        assert end <= extent.block < extent.end <= BLOCK_COUNT_MAX
        end = extent.end
    assert pack_extents(extents) == garbage


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 0, 0)],
        [(0, 1, 2)],
        [(5, 5, 0), (9, 1, 0)],
        [(5, 5, 0), (4, 1, 1)],
        [(BLOCK_COUNT_MAX, 1, 0)],
        [((1 << 64) - 1, 1, 0)],
    ],
)
def test_empty_overlapping_descending_or_astray_is_refused(rows: list[tuple[int, ...]]) -> None:
    with pytest.raises(PeerError):
        unpack_extents(b"".join(struct.pack("<QII", *row) for row in rows))


def test_zero_extent_has_no_payload() -> None:
    assert Extent(1, 3, zero=True).data_bytes == 0
    assert Extent(1, 3).data_bytes == 3 * 4096
    assert Extent(1, 3).end == 4

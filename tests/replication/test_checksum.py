import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from replication.block_set import BLOCK_BYTES
from replication.checksum import (
    CHUNK_BLOCKS,
    CHUNK_BYTES,
    DIGEST_BYTES,
    ZERO_BLOCK,
    ZERO_DIGEST,
    block_digest,
    block_digests,
    chunk_digest,
)
from tests.replication.samples import quick


def test_zeros_have_the_digest_of_zeros_and_nothing_else_has() -> None:
    assert block_digest(ZERO_BLOCK) == ZERO_DIGEST
    almost = bytearray(ZERO_BLOCK)
    almost[-1] = 1
    assert block_digest(bytes(almost)) == xxhash.xxh3_128_digest(bytes(almost)) != ZERO_DIGEST


def test_digest_is_canonical_byte_order() -> None:
    block = b"\x01" * BLOCK_BYTES
    assert block_digest(block) == xxhash.xxh3_128_intdigest(block).to_bytes(16, "big")


@quick
@given(st.lists(st.booleans(), max_size=40), st.integers())
def test_digests_of_many_blocks_are_those_of_each(zeros: list[bool], seed: int) -> None:
    source = random.Random(seed)
    blocks = [ZERO_BLOCK if zero else source.randbytes(BLOCK_BYTES) for zero in zeros]
    whole = b"".join(blocks)
    expected = b"".join(block_digest(block) for block in blocks)
    for data in (whole, bytearray(whole), memoryview(whole)):
        assert block_digests(data) == expected


def test_chunk_digest_tells_every_block_and_their_order() -> None:
    source = random.Random(1)
    digests = block_digests(source.randbytes(CHUNK_BYTES))
    whole = chunk_digest(digests)
    assert whole == xxhash.xxh3_128_digest(digests)
    for index in range(CHUNK_BLOCKS):
        other = bytearray(digests)
        other[index * DIGEST_BYTES] ^= 1
        assert chunk_digest(other) != whole
    assert chunk_digest(digests[16:] + digests[:16]) != whole
    assert chunk_digest(digests[:-16]) != whole


def test_part_of_a_block_or_of_a_digest_is_our_own_defect() -> None:
    with pytest.raises(AssertionError):
        block_digests(bytes(BLOCK_BYTES + 1))
    for digests in (b"", bytes(15), bytes(17 * 16)):
        with pytest.raises(AssertionError):
            chunk_digest(digests)

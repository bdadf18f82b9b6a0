"""Digests of blocks and chunks.

A block's digest is the xxh3-128 of its 4096 bytes (the last block of a disk padded with zeros), in
the canonical (big-endian) byte order; a block of zeros has the digest of sixteen zero bytes, so
that tables of digests are as sparse as the disks. A chunk is 16 blocks (64 KiB, aligned); its
digest is the xxh3-128 of its blocks' digests one after another, so a table of block digests
answers for chunks without reading data. The last chunk of a disk has the blocks that exist.

xxh3 finds faults, not forgers: what must resist forgery is authenticated by the envelope.

Source: FORMAT.md §3.
"""

import xxhash

from replication.block_set import BLOCK_BYTES

DIGEST_BYTES = 16
CHUNK_BLOCKS = 16
CHUNK_BYTES = CHUNK_BLOCKS * BLOCK_BYTES

ZERO_BLOCK = bytes(BLOCK_BYTES)
ZERO_DIGEST = bytes(DIGEST_BYTES)
_DIGEST_OF_ZEROS = xxhash.xxh3_128_digest(ZERO_BLOCK)  # told apart by digest: quicker than by bytes


def block_digest(block: bytes | memoryview) -> bytes:
    """Digest of one whole block of BLOCK_BYTES."""
    digest = xxhash.xxh3_128_digest(block)
    return ZERO_DIGEST if digest == _DIGEST_OF_ZEROS else digest


def block_digests(data: bytes | bytearray | memoryview) -> bytes:
    """Digests of the whole blocks of ``data``, one after another; length a multiple of 4096."""
    view = memoryview(data)
    assert len(view) % BLOCK_BYTES == 0
    digest = xxhash.xxh3_128_digest
    digests = []
    for offset in range(0, len(view), BLOCK_BYTES):
        found = digest(view[offset : offset + BLOCK_BYTES])
        digests.append(ZERO_DIGEST if found == _DIGEST_OF_ZEROS else found)
    return b"".join(digests)


def chunk_digest(digests: bytes | bytearray | memoryview) -> bytes:
    """Digest of a chunk from its blocks' digests (16 bytes each, up to CHUNK_BLOCKS of them)."""
    assert len(digests) % DIGEST_BYTES == 0
    assert 0 < len(digests) <= CHUNK_BLOCKS * DIGEST_BYTES
    return xxhash.xxh3_128_digest(digests)

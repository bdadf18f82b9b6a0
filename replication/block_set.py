"""Which blocks of one disk: a set of block numbers kept as one bit a block.

The bit of block *b* is bit ``b % 8`` of byte ``b // 8``: the layout of the tracker's bitmap in the
kernel, so that a bitmap read from there is a block set without conversion. Memory is bounded by
the disk (32 KiB per GiB), never by churn.

Source: FORMAT.md §2.
"""

from __future__ import annotations

import struct
from itertools import islice
from typing import TYPE_CHECKING, Self

import numpy as np
import xxhash
import zstandard

from replication.errors import IntegrityError, PeerError

if TYPE_CHECKING:
    from collections.abc import Buffer, Iterator  # type: ignore[attr-defined]

    import numpy.typing as npt

BLOCK_BYTES = 4096
"""The grain of tracking."""

BLOCK_COUNT_MAX = 1 << 36
"""256 TiB: far above any disk, low enough that no arithmetic on bytes overflows 64 bits."""

RUN_WINDOW_BLOCKS = 1 << 18
"""Runs are cut at multiples of this (1 GiB), so that listing them takes bounded memory."""

_HEADER = struct.Struct("<4sB3sQQ16s")
_DIGESTED_HEADER_BYTES = 16
_MAGIC = b"USB1"
_VERSION = 1
_ZSTD_GAIN_MAX = 1 << 15  # a zstd block makes at most 128 KiB of at least 4 bytes
assert _HEADER.size == 40


def block_count_of(size_bytes: int) -> int:
    """How many blocks a disk of ``size_bytes`` has; the last one may be short."""
    return -(-size_bytes // BLOCK_BYTES)


class BlockSet:
    """A set of blocks of a disk of ``block_count`` blocks; mutable, never resized."""

    __slots__ = ("_bits", "block_count")

    def __init__(self, block_count: int) -> None:
        if not 0 <= block_count <= BLOCK_COUNT_MAX:
            raise PeerError(f"a disk of {block_count} blocks is outside 0 to {BLOCK_COUNT_MAX}")
        self.block_count = block_count
        # Whole 64-bit words, as in the kernel; bits past the end are kept zero.
        self._bits: npt.NDArray[np.uint8] = np.zeros(-(-block_count // 64) * 8, np.uint8)

    @classmethod
    def full(cls, block_count: int) -> BlockSet:
        """Every block of the disk."""
        made = cls(block_count)
        made.add_run(0, block_count)
        return made

    @classmethod
    def from_bitmap(cls, bitmap: Buffer, block_count: int) -> BlockSet:
        """Copy a bitmap in the kernel's layout; at least ``block_count`` bits long."""
        made = cls(block_count)
        made.add_bitmap(bitmap)
        return made

    def copy(self) -> BlockSet:
        made = BlockSet(self.block_count)
        made._bits[:] = self._bits
        return made

    def __len__(self) -> int:
        return int(np.bitwise_count(self._bits.view(np.uint64)).sum())

    def __bool__(self) -> bool:
        return bool(self._bits.any())

    def __contains__(self, block: int) -> bool:
        return 0 <= block < self.block_count and bool(self._bits[block >> 3] >> (block & 7) & 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockSet):
            return NotImplemented
        same_disk = self.block_count == other.block_count
        return same_disk and bool(np.array_equal(self._bits, other._bits))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"BlockSet({len(self)} of {self.block_count})"

    def clear(self) -> None:
        self._bits[:] = 0

    def add_bitmap(self, bitmap: Buffer) -> None:
        """Add every block whose bit is set in ``bitmap`` (kernel layout)."""
        given = np.frombuffer(bitmap, np.uint8)
        if len(given) * 8 < self.block_count:
            raise PeerError(f"a bitmap of {len(given)} bytes is too short for {self!r}")
        take = min(len(given), len(self._bits))
        self._bits[:take] |= given[:take]
        self._trim()

    def add_run(self, block: int, count: int) -> None:
        """Add ``count`` blocks from ``block``; the run must lie on the disk."""
        self._check(block, count)
        end = block + count
        first_byte, last_byte = block >> 3, (end - 1) >> 3
        if count == 0:
            return
        head = 0xFF << (block & 7) & 0xFF
        tail = 0xFF >> (7 - ((end - 1) & 7))
        if first_byte == last_byte:
            self._bits[first_byte] |= head & tail
            return
        self._bits[first_byte] |= head
        self._bits[first_byte + 1 : last_byte] = 0xFF
        self._bits[last_byte] |= tail

    def discard_run(self, block: int, count: int) -> None:
        """Take ``count`` blocks from ``block`` out of the set."""
        cut = BlockSet(self.block_count)
        cut.add_run(block, count)
        self -= cut

    def __ior__(self, other: BlockSet) -> Self:
        self._same(other)
        self._bits |= other._bits
        return self

    def __or__(self, other: BlockSet) -> BlockSet:
        made = self.copy()
        made |= other
        return made

    def __isub__(self, other: BlockSet) -> Self:
        self._same(other)
        self._bits &= ~other._bits
        return self

    def __sub__(self, other: BlockSet) -> BlockSet:
        made = self.copy()
        made -= other
        return made

    def __iand__(self, other: BlockSet) -> Self:
        self._same(other)
        self._bits &= other._bits
        return self

    def __and__(self, other: BlockSet) -> BlockSet:
        made = self.copy()
        made &= other
        return made

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield ``(first block, count)`` in order; a run never crosses RUN_WINDOW_BLOCKS."""
        window_bytes = RUN_WINDOW_BLOCKS // 8
        for offset in range(0, len(self._bits), window_bytes):
            window = self._bits[offset : offset + window_bytes]
            used = np.flatnonzero(window)
            if len(used) == 0:
                continue
            bits = np.unpackbits(window[used], bitorder="little").reshape(-1, 8)
            blocks = (used[:, None] * 8 + np.arange(8))[bits.view(np.bool_)] + offset * 8
            breaks = np.flatnonzero(np.diff(blocks) != 1)
            firsts = blocks[np.concatenate(([0], breaks + 1))]
            lasts = blocks[np.concatenate((breaks, [len(blocks) - 1]))]
            yield from zip(firsts.tolist(), (lasts - firsts + 1).tolist(), strict=True)

    def first(self, count: int, runs_max: int | None = None) -> BlockSet:
        """The ``count`` lowest blocks of the set or all of them, in at most ``runs_max`` runs."""
        made = BlockSet(self.block_count)
        for block, run_count in islice(self.runs(), runs_max):
            if count <= 0:
                break
            made.add_run(block, min(run_count, count))
            count -= run_count
        return made

    def run_count(self) -> int:
        """How many runs of neighbouring blocks there are (not cut at windows, as ``runs`` does)."""
        words = self._bits.view(np.uint64)
        before = np.zeros_like(words)
        before[1:] = words[:-1] >> np.uint64(63)
        return int(np.bitwise_count(words & ~(words << np.uint64(1) | before)).sum())

    def to_bitmap(self) -> bytes:
        """The set in the kernel's layout, whole 64-bit words."""
        return self._bits.tobytes()

    def to_bytes(self) -> bytes:
        """The set as a self-checking record: FORMAT.md §2."""
        bitmap = self._bits.tobytes()
        body = zstandard.ZstdCompressor(level=1).compress(bitmap)
        head = _HEADER.pack(_MAGIC, _VERSION, bytes(3), self.block_count, len(body), bytes(16))
        return head[:-16] + _digest(head, bitmap) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> BlockSet:
        """Read what ``to_bytes`` wrote.

        Raises PeerError on bad magic, version or lengths, IntegrityError on a wrong digest.
        Memory is bounded by the declared block count, which is itself bounded by the body: zstd
        is told the size to expect and stops there, and a size that no such body can unpack to is
        refused before.
        """
        if len(data) < _HEADER.size:
            raise PeerError(f"a block set of {len(data)} bytes is shorter than its header")
        magic, version, reserved, block_count, body_bytes, digest = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != _VERSION:
            raise PeerError(f"not a block set of version {_VERSION}: {magic!r} {version}")
        if any(reserved):
            raise PeerError("a block set has bits set that are reserved")
        if len(data) != _HEADER.size + body_bytes:
            raise PeerError(f"a block set declares {body_bytes} bytes, {len(data)} are there")
        made_bytes = -(-block_count // 64) * 8
        body = data[_HEADER.size :]
        try:
            declared = zstandard.frame_content_size(body)
            too_many = block_count > BLOCK_COUNT_MAX or made_bytes > body_bytes * _ZSTD_GAIN_MAX
            if too_many or declared != made_bytes:
                raise PeerError(f"a block set of {block_count} blocks unpacks to {declared} bytes")
            bitmap = zstandard.ZstdDecompressor().decompress(
                body, max_output_size=made_bytes, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise IntegrityError(f"a block set does not unpack: {error}") from error
        if _digest(data, bitmap) != digest:
            raise IntegrityError("a block set does not have the digest that it declares")
        made = cls(block_count)
        made.add_bitmap(bitmap)
        if made._bits.tobytes() != bitmap:
            raise PeerError(f"a block set has blocks behind the end of its {block_count}")
        return made

    def _trim(self) -> None:
        """Keep the bits past the last block zero."""
        full, rest = divmod(self.block_count, 8)
        if full < len(self._bits):
            self._bits[full] &= (1 << rest) - 1
            self._bits[full + 1 :] = 0

    def _check(self, block: int, count: int) -> None:
        if block < 0 or count < 0 or block + count > self.block_count:
            raise PeerError(
                f"blocks {block} to {block + count} are outside a disk of {self.block_count}"
            )

    def _same(self, other: BlockSet) -> None:
        if self.block_count != other.block_count:
            raise PeerError(f"{self!r} and {other!r} are of disks of different sizes")


def _digest(head: bytes, bitmap: bytes) -> bytes:
    """The block count is in it too: a set moved to a disk of another size would miss blocks."""
    hasher = xxhash.xxh3_128(head[:_DIGESTED_HEADER_BYTES])
    hasher.update(bitmap)
    digest: bytes = hasher.digest()
    return digest

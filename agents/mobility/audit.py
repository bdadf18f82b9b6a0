"""The continuous audit: digests of a few chunks with each changeset, disks covered in turn.

Chunks are read while the machine runs; those that change before the consistency point are read
again at it. A chunk that changed *without* the tracker's notice keeps its early digest or its late
one, and either differs from what the second site holds: that is what the audit is for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agents.mobility.source import SourceDisk
from agents.mobility.stream_state import BlockSets
from replication.block_set import block_count_of
from replication.checksum import CHUNK_BLOCKS, block_digests, chunk_digest
from replication.manifest import AuditDigest


@dataclass(frozen=True, slots=True)
class Chunk:
    """A 64 KiB chunk of a disk by its number on the disk."""

    disk: SourceDisk
    number: int

    @property
    def block(self) -> int:
        return self.number * CHUNK_BLOCKS

    @property
    def count(self) -> int:
        return min(CHUNK_BLOCKS, self.disk.block_count - self.block)

    def digest(self) -> AuditDigest:
        data = self.disk.read_blocks(self.block, self.count)
        return AuditDigest(self.disk.index, self.number, chunk_digest(block_digests(data)))

    def touched_by(self, sets: BlockSets) -> bool:
        blocks = sets.get(self.disk.index)
        return blocks is not None and any(
            block in blocks for block in range(self.block, self.block + self.count)
        )


def sample(disks: Sequence[SourceDisk], cursor: int, count: int) -> tuple[list[Chunk], int]:
    """The next ``count`` chunks from ``cursor`` (counted over all disks), and the cursor after."""
    sizes = [-(-block_count_of(disk.shape.size_bytes) // CHUNK_BLOCKS) for disk in disks]
    total = sum(sizes)
    picked = []
    for step in range(min(count, total)):
        number = (cursor + step) % total
        for disk, size in zip(disks, sizes, strict=True):
            if number < size:
                picked.append(Chunk(disk, number))
                break
            number -= size
    return picked, (cursor + len(picked)) % total


class AuditSample:
    """Digests of some chunks, kept true up to the consistency point."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._digests = {chunk: chunk.digest() for chunk in chunks}

    def refresh(self, changed: BlockSets) -> None:
        """Read the chunks again that ``changed`` touches."""
        for chunk in self._digests:
            if chunk.touched_by(changed):
                self._digests[chunk] = chunk.digest()

    def digests(self) -> tuple[AuditDigest, ...]:
        return tuple(self._digests.values())

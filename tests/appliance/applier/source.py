"""A protected machine and its process server as far as the cache shows them: real blobs of it."""

import random
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import xxhash

from appliance.applier.cache_account import CacheAccount
from replication.block_set import BLOCK_BYTES, block_count_of
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.cache_layout import container_name, manifest_name, segment_name
from replication.checksum import CHUNK_BLOCKS, CHUNK_BYTES, block_digests, chunk_digest
from replication.envelope import AttemptSealer
from replication.extent import Extent
from replication.frame import PLAIN_BYTES_MAX
from replication.manifest import NO_BASIS, AuditDigest, Manifest, SegmentEntry

TIME_NS = 1_700_000_000_000_000_000
STEP_NS = 300_000_000_000
"""Bookmarks are five minutes apart, so that thinning keeps each of them."""


@dataclass(frozen=True)
class Changeset:
    """A sealed changeset and what the disks held at its bookmark."""

    manifest: Manifest
    sealed: bytes
    segments: tuple[bytes, ...]
    images: dict[int, bytes]

    @property
    def stamp(self) -> Stamp:
        return self.manifest.stamp

    @property
    def container(self) -> str:
        return container_name(self.manifest.machine, self.stamp)

    @property
    def manifest_name(self) -> str:
        return manifest_name(self.stamp.number)

    def segment_name(self, index: int) -> str:
        return segment_name(self.stamp.number, self.manifest.attempt, index)

    async def put(self, account: CacheAccount, *, without: Iterable[str] = ()) -> None:
        """Upload segments, then the manifest; blobs named in ``without`` do not arrive."""
        names = [self.segment_name(index) for index in range(len(self.segments))]
        blobs = dict(zip(names, self.segments, strict=True)) | {self.manifest_name: self.sealed}
        for name, blob in blobs.items():
            if name not in without:
                await account.write(self.container, name, blob)


@dataclass
class Source:
    """Disks that are scribbled on, and the changesets of what was."""

    disks: dict[int, bytearray]
    seed: int = 0
    machine: uuid.UUID = field(default_factory=uuid.uuid4)
    data_key: bytes = bytes(range(32))
    generation: int = 1
    number: int = 0
    segment_bytes: int = 256 << 10
    dirty: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    count: int = 0
    basis: bytes = NO_BASIS
    origin: bytes = NO_BASIS

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._pending: set[tuple[int, int]] = set()
        self.touch_all()

    def touch_all(self) -> None:
        """Everything is to be sent, as at the start of a generation."""
        for disk, image in self.disks.items():
            self._pending |= {(disk, block) for block in range(block_count_of(len(image)))}

    def touch(self, disk: int, blocks: Iterable[int]) -> None:
        """Send ``blocks`` with the next changeset, changed or not."""
        self._pending |= {(disk, block) for block in blocks}

    def write(self, disk: int, block: int, data: bytes) -> None:
        at = block * BLOCK_BYTES
        end = min(at + len(data), len(self.disks[disk]))
        self.disks[disk][at:end] = data[: end - at]
        self.touch(disk, range(block, block_count_of(end)))

    def scribble(self, count: int = 20) -> None:
        """Write ``count`` runs of random or zero blocks anywhere."""
        for _ in range(count):
            disk = self.random.choice(sorted(self.disks))
            blocks = block_count_of(len(self.disks[disk]))
            run = self.random.randint(1, 8)
            zero = self.random.random() < 0.25
            data = bytes(run * BLOCK_BYTES) if zero else self.random.randbytes(run * BLOCK_BYTES)
            self.write(disk, self.random.randrange(blocks), data)

    def new_generation(self) -> None:
        self.generation += 1
        self.number = 0
        self.dirty.clear()
        self._pending.clear()
        self.touch_all()

    def changeset(
        self,
        *,
        since: int | None = None,
        consistency: Consistency = Consistency.CRASH,
        audit: Sequence[tuple[int, int]] | None = None,
        repaired: int = 0,
        initial: bool = False,
        stale: int = 0,
        astray: bool = False,
    ) -> Changeset:
        """Close what was written into the next changeset.

        since: not the number before: all that changed after it goes along.
        audit: chunks (disk, chunk) sampled; some by default.
        stale: how many blocks go twice, first with old data, in earlier frames.
        astray: a frame writes behind the end of its disk.
        """
        self.number += 1
        self.count += 1
        self.dirty[self.number], self._pending = self._pending, set()
        start = self.number - 1 if since is None else since
        blocks = set().union(*(self.dirty[number] for number in self.dirty if number > start))
        stamp = Stamp(self.generation, self.number)
        sealer = AttemptSealer(self.data_key, self.machine, stamp)
        frames = self._stale_frames(sealer, sorted(blocks)[:stale])
        for disk in sorted(self.disks):
            frames += self._frames(sealer, disk, sorted(b for d, b in blocks if d == disk))
        if astray:
            blocks_there = block_count_of(len(self.disks[0]))
            frames.append(_frame(sealer, 0, [Extent(blocks_there, 1)], bytes(BLOCK_BYTES)))
        segments, counts = self._segments(frames)
        manifest = Manifest(
            machine=self.machine,
            bookmark=Bookmark(stamp, TIME_NS + self.count * STEP_NS, consistency),
            since=start,
            attempt=sealer.attempt,
            disks=tuple(
                DiskShape(disk, f"disk{disk}", len(image))
                for disk, image in sorted(self.disks.items())
            ),
            segments=tuple(
                SegmentEntry(count, len(segment), xxhash.xxh3_128_digest(segment))
                for segment, count in zip(segments, counts, strict=True)
            ),
            changed_bytes=len(blocks) * BLOCK_BYTES,
            captured_ns=TIME_NS,
            repaired=repaired,
            initial=initial,
            basis=self.basis,
            origin=self.origin,
            audit=tuple(self.audit_digest(*chunk) for chunk in self._sample(audit)),
        )
        images = {disk: bytes(image) for disk, image in self.disks.items()}
        return Changeset(manifest, manifest.seal(sealer), tuple(segments), images)

    def resync(self) -> Changeset:
        """Begin a generation with the changeset that closes the one before."""
        self.generation += 1
        self.number = 1
        self.count += 1
        self.dirty.clear()
        self._pending.clear()
        self.dirty[1] = set()
        self.basis = NO_BASIS
        stamp = Stamp(self.generation, 1)
        sealer = AttemptSealer(self.data_key, self.machine, stamp)
        manifest = Manifest(
            machine=self.machine,
            bookmark=Bookmark(stamp, TIME_NS + self.count * STEP_NS, Consistency.NONE, "a resync"),
            since=0,
            attempt=sealer.attempt,
            disks=tuple(
                DiskShape(disk, f"disk{disk}", len(image))
                for disk, image in sorted(self.disks.items())
            ),
            segments=(),
            changed_bytes=0,
            captured_ns=TIME_NS,
            initial=True,
            resync=True,
        )
        return Changeset(manifest, manifest.seal(sealer), (), {})

    def again(self, changeset: Changeset) -> Changeset:
        """Another attempt at the newest changeset, as after an agent's crash."""
        sealer = AttemptSealer(self.data_key, self.machine, changeset.stamp)
        frames: list[bytes] = []
        blocks = self.dirty[changeset.stamp.number]
        for disk in sorted(self.disks):
            frames += self._frames(sealer, disk, sorted(b for d, b in blocks if d == disk))
        segments, counts = self._segments(frames)
        manifest = replace(
            changeset.manifest,
            attempt=sealer.attempt,
            segments=tuple(
                SegmentEntry(count, len(segment), xxhash.xxh3_128_digest(segment))
                for segment, count in zip(segments, counts, strict=True)
            ),
        )
        return Changeset(manifest, manifest.seal(sealer), tuple(segments), changeset.images)

    def audit_digest(self, disk: int, chunk: int) -> AuditDigest:
        data = bytes(self.disks[disk][chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES])
        padded = data.ljust(-(-len(data) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")
        return AuditDigest(disk, chunk, chunk_digest(block_digests(padded)))

    def _sample(self, audit: Sequence[tuple[int, int]] | None) -> Sequence[tuple[int, int]]:
        if audit is not None:
            return audit
        return [
            (disk, self.random.randrange(-(-block_count_of(len(image)) // CHUNK_BLOCKS)))
            for disk, image in self.disks.items()
            for _ in range(4)
        ]

    def _stale_frames(
        self, sealer: AttemptSealer, blocks: Sequence[tuple[int, int]]
    ) -> list[bytes]:
        return [
            _frame(sealer, disk, [Extent(block, 1)], self.random.randbytes(BLOCK_BYTES))
            for disk, block in blocks
        ]

    def _frames(self, sealer: AttemptSealer, disk: int, blocks: Sequence[int]) -> list[bytes]:
        frames: list[bytes] = []
        extents: list[Extent] = []
        data = bytearray()
        for block in blocks:
            at = block * BLOCK_BYTES
            content = bytes(self.disks[disk][at : at + BLOCK_BYTES]).ljust(BLOCK_BYTES, b"\0")
            zero = not any(content)
            if len(data) + BLOCK_BYTES > PLAIN_BYTES_MAX or len(extents) == 1000:
                frames.append(_frame(sealer, disk, extents, bytes(data)))
                extents, data = [], bytearray()
            last = extents[-1] if extents else None
            if last is not None and last.end == block and last.zero == zero:
                extents[-1] = Extent(last.block, last.count + 1, zero)
            else:
                extents.append(Extent(block, 1, zero))
            data += b"" if zero else content
        if extents:
            frames.append(_frame(sealer, disk, extents, bytes(data)))
        return frames

    def _segments(self, frames: Sequence[bytes]) -> tuple[list[bytes], list[int]]:
        segments: list[bytes] = []
        counts: list[int] = []
        for frame in frames:
            if segments and len(segments[-1]) + len(frame) <= self.segment_bytes:
                segments[-1] += frame
                counts[-1] += 1
            else:
                segments.append(frame)
                counts.append(1)
        return segments, counts


def _frame(sealer: AttemptSealer, disk: int, extents: Sequence[Extent], data: bytes) -> bytes:
    return sealer.seal_frame(sealer.next_number(), disk, extents, data)


def a_source(*sizes: int, seed: int = 0) -> Source:
    """Disks of ``sizes`` bytes (two odd ones by default), filled at random."""
    rng = random.Random(seed)
    disks = {}
    for index, size in enumerate(sizes or (3 * (1 << 20) + 512, 700 << 10)):
        image = bytearray(rng.randbytes(size))
        image[size // 4 : size // 2] = bytes(size // 2 - size // 4)
        disks[index] = image
    return Source(disks, seed=seed)

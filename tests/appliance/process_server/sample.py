"""Changesets as an agent would send them, small and quick to make."""

import os
import uuid
from dataclasses import dataclass

import xxhash

from replication.bookmark import NOTHING, Bookmark, Consistency, DiskShape, Stamp
from replication.envelope import AttemptSealer
from replication.extent import Extent
from replication.manifest import Manifest, SegmentEntry

DATA_KEY = bytes(range(32))
DISK = DiskShape(0, "/dev/sdb", 1 << 40)


@dataclass(frozen=True, slots=True)
class SampleChangeset:
    """A whole changeset: its segments' bytes and its manifest's."""

    machine: uuid.UUID
    stamp: Stamp
    attempt: bytes
    segments: tuple[bytes, ...]
    manifest: Manifest
    content: bytes


def make_changeset(
    machine: uuid.UUID,
    stamp: Stamp,
    *,
    since: int | None = None,
    segment_count: int = 2,
    frames_per_segment: int = 2,
    blocks_per_frame: int = 4,
    applied: Stamp = NOTHING,
) -> SampleChangeset:
    """A changeset of random blocks."""
    sealer = AttemptSealer(DATA_KEY, machine, stamp)
    attempt = sealer.attempt
    segments = []
    for _ in range(segment_count):
        frames = []
        for _ in range(frames_per_segment):
            data = os.urandom(4096 * blocks_per_frame)
            frame = sealer.seal_frame(sealer.next_number(), 0, [Extent(0, blocks_per_frame)], data)
            frames.append(frame)
        segments.append(b"".join(frames))
    manifest = Manifest(
        machine=machine,
        bookmark=Bookmark(stamp, 1_700_000_000_000_000_000 + stamp.number, Consistency.CRASH),
        since=stamp.number - 1 if since is None else since,
        attempt=attempt,
        disks=(DISK,),
        segments=tuple(
            SegmentEntry(frames_per_segment, len(one), xxhash.xxh3_128_digest(one))
            for one in segments
        ),
        changed_bytes=segment_count * frames_per_segment * blocks_per_frame * 4096,
        captured_ns=1_600_000_000_000_000_000,
        applied=applied,
    )
    return SampleChangeset(
        machine, stamp, attempt, tuple(segments), manifest, manifest.seal(sealer)
    )

"""A changeset in the spool, under way and committed, and how far it is uploaded."""

import time
from dataclasses import dataclass, field

from appliance.process_server.segment_file import AttemptId, Segment
from replication.bookmark import Stamp


@dataclass(slots=True)
class Uploads:
    """Indexes of segments whose upload has begun, and of those that the cache has acknowledged."""

    begun: set[int] = field(default_factory=set)
    done: set[int] = field(default_factory=set)


@dataclass(slots=True)
class OpenAttempt:
    """An attempt that is not committed.

    began:   attempts that began later have a higher one.
    uploads: those ahead of its commit.
    """

    id: AttemptId
    began: int
    segments: dict[int, Segment] = field(default_factory=dict)
    uploads: Uploads = field(default_factory=Uploads)

    @property
    def size_bytes(self) -> int:
        return sum(segment.size_bytes for segment in self.segments.values())


@dataclass(slots=True)
class Changeset:
    """A committed changeset, and how far it is uploaded.

    since:           the number that it counts from.
    committed_ns:    when it was acknowledged, by the clock here.
    uploads:         of its segments; its attempt's own, once it was one.
    whole:           whether the manifest is there too.
    recheck_at:      when the cache is next asked whether it still has it all (loop time).
    recheck_seconds: how long it waits for that.
    """

    id: AttemptId
    segments: tuple[Segment, ...]
    since: int
    time_ns: int
    manifest_bytes: int
    manifest_digest: bytes
    committed_ns: int = field(default_factory=time.time_ns)
    uploads: Uploads = field(default_factory=Uploads)
    whole: bool = False
    recheck_at: float = 0.0
    recheck_seconds: float = 0.0

    @property
    def stamp(self) -> Stamp:
        return self.id.stamp

    @property
    def size_bytes(self) -> int:
        return self.manifest_bytes + sum(segment.size_bytes for segment in self.segments)

    @property
    def lacks_manifest(self) -> bool:
        """Whether all segments are in the cache, and nothing else is missing there."""
        return not self.whole and all(one.index in self.uploads.done for one in self.segments)

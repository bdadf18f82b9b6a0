"""Which segment of a stream goes into the cache next. Pure: no cache, no clock.

Oldest first: those of committed changesets, then those of a changeset that is still coming. The
latter go *ahead* of their commit so that a large one, of an initial replication say, is received
and uploaded at once instead of in turn. Nobody sees them before their manifest, which comes last.
What an abandoned attempt leaves behind goes with its container, so ahead goes only what is large,
and only so much between two commits.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from appliance.process_server.changeset import Changeset, OpenAttempt
from appliance.process_server.segment_file import Segment
from appliance.process_server.stream import Stream, held_in_order
from replication.bookmark import NOTHING, Stamp

CHANGESETS_AHEAD_MAX = 8
"""Of one machine, whose segments are on their way while the oldest's manifest is waited for."""

AHEAD_BYTES_MIN = 32 << 20
"""A changeset of which less has come waits for its commit."""

AHEAD_BYTES_MAX = 512 << 20
"""Of one machine, uploaded ahead since its last commit: at most so much is left behind."""


@dataclass(frozen=True, slots=True)
class Due:
    """A segment that is to be put, and what it is of."""

    of: Changeset | OpenAttempt
    segment: Segment


@dataclass(slots=True)
class UploadOrder:
    """Gives each segment of a stream out once, and counts what goes ahead.

    ahead_bytes_min, ahead_bytes_max: as the constants of these names.

    committed:   the newest commit when the counting began.
    ahead_bytes: given out since, ahead of a commit.
    """

    ahead_bytes_min: int = AHEAD_BYTES_MIN
    ahead_bytes_max: int = AHEAD_BYTES_MAX
    committed: Stamp = NOTHING
    ahead_bytes: int = 0

    def take(self, stream: Stream) -> Due | None:
        """The next segment; None while there is none."""
        due = next(_of_changesets(held_in_order(stream)), None)
        if due is None and _is_open(stream.held.values()):
            due = self._ahead(stream)
        if due is not None:
            due.of.uploads.begun.add(due.segment.index)
        return due

    def _ahead(self, stream: Stream) -> Due | None:
        if stream.position.committed != self.committed:
            self.committed, self.ahead_bytes = stream.position.committed, 0
        for attempt in sorted(stream.attempts.values(), key=lambda one: one.began):
            if attempt.size_bytes < self.ahead_bytes_min:
                continue
            for index in sorted(attempt.segments.keys() - attempt.uploads.begun):
                segment = attempt.segments[index]
                if self.ahead_bytes + segment.size_bytes > self.ahead_bytes_max:
                    return None
                self.ahead_bytes += segment.size_bytes
                return Due(attempt, segment)
        return None


def _of_changesets(held: Iterable[Changeset]) -> Iterator[Due]:
    incomplete = (one for one in held if not one.whole)
    for _, changeset in zip(range(CHANGESETS_AHEAD_MAX), incomplete, strict=False):
        for segment in changeset.segments:
            if segment.index not in changeset.uploads.begun:
                yield Due(changeset, segment)


def _is_open(held: Iterable[Changeset]) -> bool:
    """Whether the window has room for a changeset more."""
    return sum(not one.whole for one in held) < CHANGESETS_AHEAD_MAX

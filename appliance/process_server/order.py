"""Which changeset may follow on which. Pure: no files, no clock.

Source: FORMAT.md §9, "Order".
"""

from dataclasses import dataclass, replace
from enum import Enum

from replication.bookmark import GENERATION_LEAP_MAX, NOTHING, MachineId, Stamp
from replication.errors import OutOfOrderError, PeerError
from replication.manifest import Manifest
from replication.watermark import NO_ATTEMPT, Watermark

NO_DIGEST = bytes(16)


@dataclass(frozen=True, slots=True)
class Position:
    """How far a machine's stream is known to have come.

    committed: newest changeset acknowledged here or found in the cache.
    attempt:   its attempt; NO_ATTEMPT where none or not known.
    digest:    xxh3-128 of its manifest; NO_DIGEST where not known.
    applied:   newest changeset known to be applied; never above ``committed``. Nobody here can tell
               whether a watermark is the applier's, for that takes the data key. So a watermark
               says which of the changesets that are here may go, and never that there are more.
    """

    committed: Stamp = NOTHING
    attempt: bytes = NO_ATTEMPT
    digest: bytes = NO_DIGEST
    applied: Stamp = NOTHING

    def after_commit(self, manifest: Manifest, digest: bytes) -> "Position":
        return Position(manifest.stamp, manifest.attempt, digest, self.applied)

    def after_applied(self, applied: Stamp) -> "Position":
        """Learn that ``applied`` is in the store; older news changes nothing."""
        return replace(self, applied=max(self.applied, min(applied, self.committed)))

    def awaits(self, number: int, applied: Stamp) -> bool:
        """Whether ``number`` can be that of a changeset that is acknowledged and not applied.

        ``applied`` is what the one who asks for it has: less than the most that was ever told,
        where another one's watermark has told it.
        """
        reached = applied.number if applied.generation == self.committed.generation else 0
        return applied < self.committed and reached < number <= self.committed.number

    def fallen_back(self, applied: Stamp, attempt: bytes) -> "Position":
        """What is left when changesets after ``applied`` are lost for good: ``applied`` itself.

        The agent, which keeps their block sets, sees from it that it must send them again.
        """
        assert applied <= self.committed
        return Position(applied, attempt, NO_DIGEST, applied)


class Verdict(Enum):
    """What a commit that is in order is."""

    FOLLOWS = "follows"
    REPEATED = "repeated"


def judge_commit(position: Position, manifest: Manifest, digest: bytes) -> Verdict:
    """Whether ``manifest``, whose bytes have ``digest``, may be committed.

    Raises OutOfOrderError that says what was expected.
    """
    stamp, since = manifest.stamp, manifest.since
    if stamp == position.committed:
        same = manifest.attempt == position.attempt and position.digest in (NO_DIGEST, digest)
        if same:
            return Verdict.REPEATED
        raise OutOfOrderError(
            f"changeset {stamp} is committed already, with another manifest",
            hint="send the changes as the next number",
        )
    newest = max(position.committed, manifest.applied)
    _refuse_old(newest, stamp)
    if stamp.generation > newest.generation and since:
        raise OutOfOrderError(
            f"changeset {stamp} counts from {since}, but generation {stamp.generation} begins "
            f"with it: 0 was expected",
            hint="begin the generation with an initial replication",
        )
    if stamp.generation == newest.generation and since > newest.number:
        raise OutOfOrderError(
            f"changeset {stamp} counts from {since}, which is not here: at most {newest.number} "
            f"was expected",
            hint=f"send all that changed since {newest}",
        )
    return Verdict.FOLLOWS


def judge_segment(position: Position, stamp: Stamp) -> None:
    """Raise OutOfOrderError when a segment of ``stamp`` can no longer become part of anything."""
    _refuse_old(position.committed, stamp)


def _refuse_old(newest: Stamp, stamp: Stamp) -> None:
    if stamp.generation < newest.generation:
        raise OutOfOrderError(
            f"generation {stamp.generation} is stale: {newest.generation} was expected",
            hint="ask for the state: another agent may have begun a new generation",
        )
    if stamp <= newest:
        raise OutOfOrderError(
            f"changeset {stamp} comes after {newest} is known: a number above {newest.number} "
            f"was expected",
            hint="ask for the state and go on from there",
        )


def read_watermark(content: bytes, machine: MachineId, position: Position) -> Watermark:
    """The watermark of ``machine``, whose stream is known up to ``position``.

    Raises PeerError when it is none, is another machine's, or leaps.
    """
    watermark = Watermark.from_bytes(content)
    if watermark.machine != machine:
        raise PeerError(f"the watermark of {machine} is of {watermark.machine}")
    known = position.committed.generation
    if watermark.applied.generation > known + GENERATION_LEAP_MAX:
        raise PeerError(
            f"the watermark of {machine} says {watermark.applied}; generation {known} is the "
            "newest that is known"
        )
    return watermark

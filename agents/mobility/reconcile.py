"""What agent and process server make of each other after either has been away.

A pure decision from what the agent remembers and what the process server says it holds. It is
taken at every start, after a refusal, and whenever a response shows less than the agent
remembers to be acknowledged.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from agents.mobility.stream_state import Position
from replication.bookmark import Stamp
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT


@dataclass(frozen=True, slots=True)
class GoOn:
    """Both agree."""


@dataclass(frozen=True, slots=True)
class FinishPending:
    """The commit that was under way has been taken: take note, then decide again."""


@dataclass(frozen=True, slots=True)
class DropPending:
    """The commit that was under way was not taken; its blocks are still to do. Decide again."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Changesets were lost that had been acknowledged: send their blocks again.

    since: what the second site is known to hold.
    lost:  the retained changesets whose blocks together are all that changed after it and before
           what ``todo`` counts from.
    """

    since: int
    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewGeneration:
    """What the second site holds cannot be reached by changes: send everything again."""

    reason: str


Decision = GoOn | FinishPending | DropPending | Fold | NewGeneration


def reconcile(
    position: Position, retained: Mapping[int, int], stream: StreamState, *, interrupted: str
) -> Decision:
    """Decide how to go on.

    retained:    changesets of the generation whose block sets the agent still has: number to the
                 number that it counts from.
    interrupted: why tracking was interrupted since the position was saved; empty if it was not.
    """
    generation = position.generation
    server = stream.committed
    if interrupted:
        return NewGeneration(interrupted)
    if generation == 0:
        return NewGeneration("initial replication")
    held = [(server, stream.attempt), (stream.watermark.applied, stream.watermark.attempt)]
    if position.pending is not None:
        # A process server may have lost it after all, and the store have it.
        if (position.pending.stamp, position.pending.attempt) in held:
            return FinishPending()
        return DropPending()
    if stream.watermark.lost and stream.watermark.lost_generation == generation:
        return NewGeneration(f"the second site cannot go on: {stream.watermark.lost}")
    committed = Stamp(generation, position.committed)
    if max(stamp for stamp, _ in held) > committed:
        return NewGeneration("the agent's state is older than the stream")
    ours = (NO_ATTEMPT, position.attempt)
    if position.committed and any(
        stamp == committed and attempt not in ours for stamp, attempt in held
    ):
        return NewGeneration("the stream holds a changeset that this agent did not send")
    known = max(
        [0]
        + [
            stamp.number
            for stamp in (server, position.applied, stream.watermark.applied)
            if stamp.generation == generation
        ]
    )
    lost = []
    reached = position.since
    while reached > known:
        if reached not in retained:
            return NewGeneration("changesets were lost whose blocks are no longer known")
        lost.append(reached)
        reached = retained[reached]
    return Fold(known, tuple(lost)) if lost else GoOn()

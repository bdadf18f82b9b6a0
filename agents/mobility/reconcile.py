"""What agent and process server make of each other after either has been away.

A pure decision from what the agent remembers and what the process server says it holds. It is
taken at every start, after a refusal, and whenever a response shows less than the agent
remembers to be acknowledged.

The watermark in it is authentic or says nothing: ``believed``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agents.mobility.resync_stage import Stage
from agents.mobility.stream_state import Position
from replication.bookmark import NOTHING, Stamp
from replication.control.report import ResyncCause
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Watermark, WatermarkKey


@dataclass(frozen=True, slots=True)
class GoOn:
    """Both agree."""


@dataclass(frozen=True, slots=True)
class Stand:
    """A resync is required and has not begun: nothing is sent, so nothing has to agree."""


@dataclass(frozen=True, slots=True)
class FinishPending:
    """The commit that was under way has been taken: take note, then decide again."""


@dataclass(frozen=True, slots=True)
class DropPending:
    """The commit that was under way was not taken; its blocks are still to do. Decide again."""


@dataclass(frozen=True, slots=True)
class Fold:
    """Changesets were lost that had been acknowledged: send their blocks again.

    since: what the second site is known to hold, or something before it.
    lost:  the retained changesets whose blocks together are all that changed after it and before
           what ``todo`` counts from.
    """

    since: int
    lost: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Begin:
    """The first generation of a machine that nobody knows: all blocks are sent."""


@dataclass(frozen=True, slots=True)
class Require:
    """What the second site holds cannot be reached by changes: compare, and send what differs.

    ordered: it need not wait for leave.
    """

    cause: ResyncCause
    reason: str
    ordered: bool = False


Decision = GoOn | Stand | FinishPending | DropPending | Fold | Begin | Require


def reconcile(position: Position, retained: Mapping[int, int], stream: StreamState) -> Decision:
    """Decide how to go on.

    retained: changesets of the generation whose block sets the agent still has: number to the
              number that it counts from.
    """
    generation = position.generation
    server = stream.committed
    if position.stage is Stage.REQUIRED:
        return Stand()
    if generation == 0:
        return _first(stream)
    held = [(server, stream.attempt), (stream.watermark.applied, stream.watermark.attempt)]
    if position.pending is not None:
        # A process server may have lost it after all, and the store have it.
        if (position.pending.stamp, position.pending.attempt) in held:
            return FinishPending()
        return DropPending()
    if stream.watermark.lost and stream.watermark.lost_generation == generation:
        return Require(
            lost_cause(stream.watermark), f"the second site cannot go on: {stream.watermark.lost}"
        )
    used = max(position.committed, position.used)
    if max(stamp for stamp, _ in held) > Stamp(generation, used):
        return Require(ResyncCause.STREAM_LOST, "the agent's state is older than the stream")
    ours = {position.used: position.used_attempt, position.committed: position.attempt}
    if any(
        stamp.generation == generation
        and stamp.number > 0
        and ours.get(stamp.number, attempt) != attempt
        and attempt != NO_ATTEMPT
        for stamp, attempt in held
    ):
        return Require(
            ResyncCause.STREAM_LOST, "the stream holds a changeset that this agent did not send"
        )
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
            return Require(
                ResyncCause.STREAM_LOST, "changesets were lost whose blocks are no longer known"
            )
        lost.append(reached)
        reached = retained[reached]
    # Not ``known``: that may be a changeset whose commit came late, and whose blocks nobody kept.
    return Fold(reached, tuple(lost)) if lost else GoOn()


def believed(stream: StreamState, key: WatermarkKey) -> tuple[StreamState, bool]:
    """The same without a watermark that the applier has not written, and whether there is one.

    Such a one says nothing: nothing is newly applied, lost, to be repaired, or compared with.
    """
    watermark = stream.watermark
    if watermark.machine == key.machine and watermark.is_authentic(key):
        return stream, False
    blank = Watermark(key.machine)
    return replace(stream, watermark=blank), watermark != blank


def lost_cause(watermark: Watermark) -> ResyncCause:
    """What kind of loss the applier tells of."""
    try:
        return ResyncCause(watermark.lost_cause)
    except ValueError:
        return ResyncCause.STREAM_LOST


def _first(stream: StreamState) -> Begin | Require:
    """The agent remembers nothing: nothing is being replicated, so no leave is waited for."""
    if max(stream.committed, stream.watermark.applied) == NOTHING:
        return Begin()
    return Require(
        ResyncCause.TRACKING_LOST,
        "this agent remembers nothing of what it, or another one, has sent before",
        ordered=True,
    )

"""The steps by which the agent's memory moves, each one durable write.

The order around a commit:

1. the blocks of the changeset are written beside the state (``make_pending``, first half);
2. the state says that its commit is pending, number and attempt (second half);
3. the commit is sent and acknowledged;
4. the state says that it is committed, and ``todo`` no longer holds its blocks (``finish``).

A crash before 3 leaves a pending commit that the process server does not know: dropped, taken anew.
A crash after 3 leaves one that it knows: finished at the next start. Between 2 and 4 the trackers
are not swapped, so ``todo`` does not change and step 4 can be repeated.
"""

from collections.abc import Mapping, Sequence

import structlog

from agents.mobility.device import DeviceIdentity
from agents.mobility.reconcile import (
    DropPending,
    FinishPending,
    Fold,
    GoOn,
    NewGeneration,
    reconcile,
)
from agents.mobility.stream_state import BlockSets, Pending, StreamStateFile, merge, subtract
from replication.block_set import BlockSet
from replication.bookmark import GENERATION_LEAP_MAX, Stamp
from replication.errors import PeerError
from replication.stream import StreamState
from replication.watermark import Repair

RECONCILE_STEPS_MAX = 8


def make_pending(
    state: StreamStateFile, pending: Pending, sent: BlockSets, *, audit_chunk: int
) -> None:
    """Steps 1 and 2: after this the commit may be sent."""
    state.retain(pending.stamp.number, state.position.since, sent)
    state.save(pending=pending, audit_chunk=audit_chunk)


def finish(state: StreamStateFile) -> None:
    """Step 4: the pending commit is acknowledged."""
    position = state.position
    pending = position.pending
    assert pending is not None
    number = pending.stamp.number
    # Changed in memory only once it is durable: else a failed write would leave a commit pending
    # whose blocks are no longer to do.
    todo = {disk: blocks.copy() for disk, blocks in state.todo.items()}
    subtract(todo, state.read_retained(number))
    state.save(
        todo,
        committed=number,
        attempt=pending.attempt,
        since=number,
        pending=None,
        seeded=position.seeded or pending.whole,
        repaired=position.repairing if pending.whole else position.repaired,
    )


def drop_pending(state: StreamStateFile) -> None:
    """The commit was not taken: its blocks are still in ``todo``."""
    pending = state.position.pending
    assert pending is not None
    state.save(pending=None)
    state.forget([pending.stamp.number])


def fold(state: StreamStateFile, since: int, lost: Sequence[int]) -> None:
    """Changesets were lost upstream: their blocks are to do again, counting from ``since``."""
    for number in lost:
        merge(state.todo, state.read_retained(number))
    state.save(since=since)  # before the sets go
    state.forget(lost)


def begin_generation(
    state: StreamStateFile,
    stream: StreamState,
    block_counts: Mapping[int, int],
    identities: Mapping[int, DeviceIdentity],
) -> None:
    """All blocks of all disks are to do; the trackers run already, so none is missed."""
    known = (
        state.position.generation,
        stream.committed.generation,
        stream.watermark.applied.generation,
    )
    if max(known) > state.position.generation + GENERATION_LEAP_MAX:
        raise PeerError(
            f"the second site speaks of generation {max(known)}; the agent has begun "
            f"{state.position.generation}",
            hint="no machine has so many: see who else writes into the cache storage account",
        )
    state.save(
        {disk: BlockSet.full(count) for disk, count in block_counts.items()},
        generation=max(known) + 1,
        committed=0,
        since=0,
        pending=None,
        seeded=False,
        repaired=stream.watermark.repair.request,
        repairing=stream.watermark.repair.request,
        audit_chunk=0,
        identities=identities,
    )
    state.drop_retained()


def learn_applied(state: StreamStateFile, applied: Stamp) -> int:
    """Let go of block sets whose changesets are applied; returns how many are still kept.

    That they are applied is durable before they go: whatever else is lost, nobody asks for them.
    The set of a pending commit stays: ``finish`` needs it, also when the changeset has come all
    the way before the agent knows that it was acknowledged.
    """
    position = state.position
    retained = state.retained()
    if applied.generation != position.generation:
        return len(retained)
    pending = position.pending.stamp.number if position.pending else 0
    done = [number for number in retained if number <= applied.number and number != pending]
    if applied > position.applied:
        state.save(applied=applied)
    if done:
        state.forget(done)
    return len(retained) - len(done)


def take_up_repair(state: StreamStateFile, repair: Repair) -> bool:
    """Add what the applier asks for to ``todo``, durably; False when there is nothing new.

    A request of a lower number is new too: the one before may have been no applier's, or the
    applier has lost its book.
    """
    if repair.request in (0, state.position.repairing):
        return False
    for run in repair.runs:
        blocks = state.todo.get(run.disk)
        if blocks is not None and run.block < blocks.block_count:
            blocks.add_run(run.block, min(run.count, blocks.block_count - run.block))
    state.save(repairing=repair.request)
    return True


def settle(
    state: StreamStateFile,
    stream: StreamState,
    block_counts: Mapping[int, int],
    identities: Mapping[int, DeviceIdentity],
    *,
    interrupted: str,
) -> None:
    """Bring memory and process server together; see ``reconcile.py`` for the decisions."""
    log = structlog.get_logger()
    for _ in range(RECONCILE_STEPS_MAX):
        decision = reconcile(state.position, state.retained(), stream, interrupted=interrupted)
        match decision:
            case GoOn():
                return
            case FinishPending():
                log.info("the pending changeset had been acknowledged")
                finish(state)
            case DropPending():
                log.info("the pending changeset had not been acknowledged; it is taken anew")
                drop_pending(state)
            case Fold(since=since, lost=lost):
                log.warning("changesets were lost upstream; sending again", since=since, lost=lost)
                fold(state, since, lost)
            case NewGeneration(reason=reason):
                log.warning("a new generation begins", reason=reason)
                begin_generation(state, stream, block_counts, identities)
                interrupted = ""
    raise PeerError("agent and process server do not come to agree")

"""The steps by which the agent's memory moves, each one durable write.

The order around a commit:

1. the blocks of the changeset are written beside the state (``make_pending``, first half);
2. the state says that its commit is pending, number and attempt (second half);
3. the commit is sent and acknowledged;
4. the state says that it is committed, and ``todo`` no longer holds its blocks (``finish``).

A crash before 3 leaves a pending commit that the process server does not know: dropped, its blocks
taken anew under another number. The old one may yet arrive, from a request that nobody waits for
any more: then the new one, which counts from before it, is applied on top of it.
A crash after 3 leaves one that it knows: finished at the next start. Between 2 and 4 the trackers
are not swapped, so ``todo`` does not change and step 4 can be repeated.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from agents.mobility.device import DeviceIdentity
from agents.mobility.disk_set import adopt_disks
from agents.mobility.reconcile import (
    Begin,
    DropPending,
    FinishPending,
    Fold,
    GoOn,
    Require,
    Stand,
    reconcile,
)
from agents.mobility.resync_stage import Resync, Stage
from agents.mobility.stream_state import BlockSets, Pending, StreamStateFile, merge, subtract
from replication.block_set import BlockSet
from replication.bookmark import GENERATION_LEAP_MAX, Stamp
from replication.control.report import ResyncCause
from replication.errors import PeerError
from replication.manifest import BASIS_BYTES, NO_BASIS
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Repair

RECONCILE_STEPS_MAX = 8


def make_pending(
    state: StreamStateFile, pending: Pending, sent: BlockSets, *, audit_chunk: int
) -> None:
    """Steps 1 and 2: after this the commit may be sent."""
    state.retain(pending.stamp.number, state.position.since, sent)
    state.save(
        pending=pending,
        used=pending.stamp.number,
        used_attempt=pending.attempt,
        audit_chunk=audit_chunk,
    )


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
    seeded = position.seeded or pending.whole
    state.save(
        todo,
        committed=number,
        attempt=pending.attempt,
        since=number,
        pending=None,
        seeded=seeded,
        resync=None if seeded else position.resync,
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
        sets = state.read_retained(number)
        merge(
            state.todo,
            {disk: blocks for disk, blocks in sets.items() if _fits(state, disk, blocks)},
        )
    state.save(since=since)  # before the sets go
    state.forget(lost)


def _fits(state: StreamStateFile, disk: int, blocks: BlockSet) -> bool:
    """Whether a disk of an old set is still protected, in that size.

    One that came back in another size since was to do as a whole then: later sets hold all of it.
    """
    now = state.todo.get(disk)
    return now is not None and now.block_count == blocks.block_count


def begin_generation(
    state: StreamStateFile,
    stream: StreamState,
    block_counts: Mapping[int, int],
    identities: Mapping[int, DeviceIdentity],
) -> None:
    """All blocks of all disks are to do; the trackers run already, so none is missed."""
    state.save(
        {disk: BlockSet.full(count) for disk, count in block_counts.items()},
        generation=_next_generation(state, stream),
        committed=0,
        used=0,
        used_attempt=NO_ATTEMPT,
        since=0,
        pending=None,
        seeded=False,
        repaired=stream.watermark.repair.request,
        repairing=stream.watermark.repair.request,
        audit_chunk=0,
        identities=identities,
        basis=NO_BASIS,
        origin=os.urandom(BASIS_BYTES),
        resync=None,
    )
    state.drop_retained()


def require_resync(
    state: StreamStateFile,
    cause: ResyncCause,
    reason: str,
    *,
    ordered: bool = False,
    request: int = 0,
) -> None:
    """Remember durably that changes alone do not lead on any more, and why.

    From here on nothing is sent until ``begin_resync``. Of several causes the first is told; an
    order, and one for a resync that this one takes the place of, stays good.

    request: the order that is taken up by it, 0 for none.
    """
    before = state.position.resync
    if before is not None and before.stage is Stage.REQUIRED:
        cause, reason = before.cause, before.reason
    state.save(
        pending=None,
        resync=Resync(cause, reason, ordered or (before is not None and before.ordered)),
        resync_request=max(request, state.position.resync_request),
    )


def begin_resync(
    state: StreamStateFile,
    stream: StreamState,
    block_counts: Mapping[int, int],
    identities: Mapping[int, DeviceIdentity],
) -> None:
    """Begin the generation of the resync that is required.

    What is known to have changed stays to do: a write that was under way when it was noticed may
    reach the disk after the comparison has read its block. Block sets of the generation before are
    let go: what they name and the second site lacks, the comparison finds.

    The trackers run already, with the disks as they are in ``identities``.
    """
    resync = state.position.resync
    assert resync is not None, "a resync is required before it begins"
    todo = {}
    for disk, count in block_counts.items():
        before = state.todo.get(disk)
        todo[disk] = BlockSet(count) if before is None else _cut_to(before, count)
    state.save(
        todo,
        generation=_next_generation(state, stream),
        committed=0,
        used=0,
        used_attempt=NO_ATTEMPT,
        since=0,
        pending=None,
        seeded=False,
        audit_chunk=0,
        identities=identities,
        basis=NO_BASIS,
        origin=NO_BASIS,
        resync=replace(resync, stage=Stage.COMPARING, cursor=0),
    )
    state.drop_retained()


def note_compared(state: StreamStateFile, basis: bytes, found: BlockSets, cursor: int) -> None:
    """What differs from ``basis`` up to ``cursor`` is to do, durably."""
    resync = state.position.resync
    assert resync is not None
    assert resync.stage is Stage.COMPARING
    todo = {disk: blocks.copy() for disk, blocks in state.todo.items()}
    merge(todo, found)
    state.save(todo, basis=basis, resync=replace(resync, cursor=cursor))


def end_comparison(state: StreamStateFile) -> None:
    """All disks are compared: what is in ``todo`` and in the trackers is all that differs.

    That the changeset which began the generation is applied is durable from here on, so that no
    later one can claim to count from before it: what holds all changes since a comparison may be
    applied to the state that was compared, and to no other.
    """
    position = state.position
    resync = position.resync
    assert resync is not None
    assert resync.stage is Stage.COMPARING
    assert position.basis != NO_BASIS
    assert position.since == position.committed > 0
    state.save(
        applied=max(position.applied, Stamp(position.generation, position.committed)),
        resync=replace(resync, stage=Stage.SENDING),
    )


def reopen(state: StreamStateFile) -> None:
    """The store stays behind the changeset that began the resync: begin it once more.

    Nothing else has been sent, so the next one, which counts from nothing, closes all the same.
    Should the first one come after all, it is applied before.
    """
    resync = state.position.resync
    assert resync is not None
    assert resync.stage is Stage.COMPARING
    state.save(since=0, basis=NO_BASIS, resync=replace(resync, cursor=0))


def _next_generation(state: StreamStateFile, stream: StreamState) -> int:
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
    return max(known) + 1


def _cut_to(blocks: BlockSet, block_count: int) -> BlockSet:
    """The same blocks of a disk that has another size now, as far as they are on it."""
    made = BlockSet(block_count)
    for first, count in blocks.runs():
        if first < block_count:
            made.add_run(first, min(count, block_count - first))
    return made


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
) -> None:
    """Bring memory and process server together; see ``reconcile.py`` for the decisions."""
    log = structlog.get_logger()
    _next_generation(state, stream)  # a leap is nobody's: it must not even have a resync required
    for _ in range(RECONCILE_STEPS_MAX):
        decision = reconcile(state.position, state.retained(), stream)
        match decision:
            case Stand():
                return
            case GoOn():
                if state.position.stage is not Stage.COMPARING:
                    adopt_disks(state, block_counts, identities)
                elif set(state.position.identities) != set(identities):
                    # The sums are of the disks that there were when it began.
                    require_resync(
                        state,
                        ResyncCause.DISKS_CHANGED,
                        "disks came or went while they were being compared",
                    )
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
            case Begin():
                log.info("initial replication begins")
                begin_generation(state, stream, block_counts, identities)
            case Require(cause=cause, reason=reason, ordered=ordered):
                log.warning("a resync is required", cause=cause.value, reason=reason)
                require_resync(state, cause, reason, ordered=ordered)
    raise PeerError("agent and process server do not come to agree")

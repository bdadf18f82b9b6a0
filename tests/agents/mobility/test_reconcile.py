"""The decision table, exhaustively where it is small, and what must hold of every answer."""

import itertools
import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.mobility.reconcile import (
    Begin,
    Decision,
    DropPending,
    FinishPending,
    Fold,
    GoOn,
    Require,
    Stand,
    believed,
    reconcile,
)
from agents.mobility.resync_stage import Resync, Stage
from agents.mobility.stream_state import Pending, Position
from replication.bookmark import NOTHING, Stamp
from replication.control.report import ResyncCause
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Repair, RepairRun, Watermark, WatermarkKey

MACHINE = uuid.UUID(int=1)
MINE, OTHER = b"m" * 16, b"o" * 16
GENERATION = 3


def stream(
    server: Stamp = NOTHING,
    attempt: bytes = MINE,
    applied: Stamp = NOTHING,
    applied_attempt: bytes = NO_ATTEMPT,
    lost: int = 0,
) -> StreamState:
    watermark = Watermark(
        MACHINE,
        applied=applied,
        attempt=applied_attempt,
        lost="the store is gone" if lost else "",
        lost_generation=lost,
    )
    return StreamState(server, attempt, 0, 0, watermark)


def at(number: int, generation: int = GENERATION) -> Stamp:
    return Stamp(generation, number)


def position(committed: int, since: int | None = None, **changes: object) -> Position:
    made = Position(
        generation=GENERATION,
        committed=committed,
        attempt=MINE,
        since=committed if since is None else since,
        seeded=True,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def decide(where: Position, retained: dict[int, int], told: StreamState) -> Decision:
    return reconcile(where, retained, told)


def test_commit_that_comes_late_is_built_upon() -> None:
    """Its number is not given to anything else, so whoever applies it loses nothing."""
    dropped = position(10, used=11, used_attempt=OTHER)
    assert dropped.next_stamp == at(12)
    for told in (stream(at(11), OTHER), stream(at(10), applied=at(11), applied_attempt=OTHER)):
        assert decide(dropped, {}, told) == GoOn()
    assert isinstance(decide(dropped, {}, stream(at(11), b"x" * 16)), Require)
    assert isinstance(decide(dropped, {}, stream(at(12), OTHER)), Require)
    # What follows it and is lost in turn counts from before it: its own blocks nobody has kept.
    after = position(12, used=12, used_attempt=MINE)
    assert decide(after, {12: 10}, stream(at(11), OTHER)) == Fold(10, (12,))


@pytest.mark.parametrize("told", [stream(), stream(at(9)), stream(at(5), lost=GENERATION)])
def test_nothing_is_decided_while_a_resync_is_required(told: StreamState) -> None:
    waits = Resync(ResyncCause.OPERATOR, "ordered")
    pending = Pending(at(6), MINE, whole=True)
    assert decide(position(5, resync=waits, pending=pending), {5: 4}, told) == Stand()
    begun = replace(waits, stage=Stage.COMPARING)
    assert decide(position(5, resync=begun), {5: 4}, stream(at(5))) == GoOn()


def test_all_blocks_are_sent_of_a_machine_that_nobody_knows_and_of_no_other() -> None:
    assert decide(Position(), {}, stream()) == Begin()
    for told in (stream(at(1, generation=1)), stream(applied=at(3))):
        decision = decide(Position(), {}, told)
        assert isinstance(decision, Require)
        assert decision.ordered


def test_both_agree() -> None:
    assert decide(position(5), {5: 4}, stream(at(5))) == GoOn()
    assert decide(position(0), {}, stream(at(7, generation=2))) == GoOn()


def test_process_server_that_does_not_know_the_attempt_is_believed() -> None:
    assert decide(position(5), {}, stream(at(5), NO_ATTEMPT)) == GoOn()


@pytest.mark.parametrize(
    ("server", "attempt", "applied", "applied_attempt", "wanted"),
    [
        (at(6), MINE, NOTHING, NO_ATTEMPT, FinishPending()),
        (at(6), OTHER, NOTHING, NO_ATTEMPT, DropPending()),
        (at(5), MINE, NOTHING, NO_ATTEMPT, DropPending()),
        (NOTHING, NO_ATTEMPT, NOTHING, NO_ATTEMPT, DropPending()),
        # The process server has lost it after it had passed it on.
        (at(5), MINE, at(6), MINE, FinishPending()),
        (NOTHING, NO_ATTEMPT, at(6), MINE, FinishPending()),
        (NOTHING, NO_ATTEMPT, at(6), OTHER, DropPending()),
    ],
)
def test_pending_commit_is_settled_by_who_has_it(
    server: Stamp, attempt: bytes, applied: Stamp, applied_attempt: bytes, wanted: Decision
) -> None:
    where = position(5, pending=Pending(at(6), MINE, whole=True))
    told = stream(server, attempt, applied, applied_attempt)
    assert decide(where, {5: 4, 6: 5}, told) == wanted


@pytest.mark.parametrize(
    "told",
    [
        stream(at(6)),
        stream(at(1, generation=4)),
        stream(at(3), applied=at(6)),
        stream(NOTHING, NO_ATTEMPT, applied=at(1, generation=4)),
    ],
)
def test_agent_with_an_old_state_begins_anew(told: StreamState) -> None:
    decision = decide(position(5), {5: 4}, told)
    assert isinstance(decision, Require)
    assert decision.cause is ResyncCause.STREAM_LOST
    assert "older" in decision.reason


@pytest.mark.parametrize(
    "told",
    [stream(at(5), OTHER), stream(at(4), applied=at(5), applied_attempt=OTHER)],
)
def test_changeset_of_another_agent_is_noticed(told: StreamState) -> None:
    decision = decide(position(5), {5: 4}, told)
    assert isinstance(decision, Require)
    assert "did not send" in decision.reason


def test_second_site_that_cannot_go_on_gets_one_resync() -> None:
    lost = stream(at(5), applied=at(4), lost=GENERATION)
    assert isinstance(decide(position(5), {5: 4}, lost), Require)
    empty = stream(at(5), applied=NOTHING, lost=GENERATION)
    assert isinstance(decide(position(5), {5: 4}, empty), Require)
    old = stream(at(5, generation=2), applied=at(4, generation=2), lost=2)
    assert decide(position(0), {}, old) == GoOn()


def test_lost_changesets_are_folded_back_to_what_is_known() -> None:
    retained = {4: 3, 5: 4, 6: 5}
    assert decide(position(6), retained, stream(at(4))) == Fold(4, (6, 5))
    assert decide(position(6), retained, stream(NOTHING, applied=at(5))) == Fold(5, (6,))
    assert decide(position(6, applied=at(5)), retained, stream()) == Fold(5, (6,))
    # What it then counts from is what the oldest of them counted from, whatever else is known.
    assert decide(position(8), {8: 3}, stream(at(5))) == Fold(3, (8,))
    # Folded already, and not yet sent.
    assert decide(position(8, since=3), {}, stream(at(3))) == GoOn()


def test_gap_in_what_is_kept_begins_anew() -> None:
    assert isinstance(decide(position(6), {4: 3, 6: 5}, stream(at(3))), Require)


def covers(decision: Fold, retained: dict[int, int], since: int) -> bool:
    """Whether the folded sets together hold all that changed in (decision.since, since]."""
    reached = since
    for number in decision.lost:
        if number != reached:
            return False
        reached = retained[number]
    return reached <= decision.since


def check(where: Position, retained: dict[int, int], told: StreamState) -> None:
    decision = decide(where, retained, told)
    newest = max(told.committed, told.watermark.applied)
    known = max(
        stamp.number if stamp.generation == GENERATION else 0
        for stamp in (told.committed, told.watermark.applied, where.applied)
    )
    if where.pending is not None:
        assert isinstance(decision, FinishPending | DropPending)
    elif isinstance(decision, GoOn):
        assert known >= where.since  # what is sent next can be taken
        assert newest <= at(where.committed)  # and its number is free
    elif isinstance(decision, Fold):
        assert decision.since <= known < where.since
        assert covers(decision, retained, where.since)
        assert newest <= at(where.committed)
        # Once folded, both agree.
        assert decide(replace(where, since=decision.since), {}, told) == GoOn()
    else:
        assert isinstance(decision, Require)
        lacks = any(number not in retained for number in range(known + 1, where.since + 1))
        other = OTHER in (told.attempt, told.watermark.attempt)
        assert lacks or newest > at(where.committed) or other


def test_every_small_case_makes_sense() -> None:
    stamps = [NOTHING, at(9, generation=2), *(at(number) for number in range(4)), at(1, 4)]
    cases = 0
    for committed, since_back, server, applied, attempt in itertools.product(
        range(4), range(3), stamps, stamps, (NO_ATTEMPT, MINE, OTHER)
    ):
        since = max(0, committed - since_back)
        for keep in itertools.product((False, True), repeat=committed):
            retained = {number + 1: number for number, kept in enumerate(keep) if kept}
            for known in {0, since}:
                where = position(committed, since, applied=at(known) if known else NOTHING)
                check(where, retained, stream(server, attempt, applied))
                cases += 1
    assert cases > 10_000


numbers = st.integers(0, 12)


@given(
    committed=numbers,
    back=numbers,
    retained=st.dictionaries(st.integers(1, 12), numbers, max_size=12),
    server=numbers,
    applied=numbers,
    known=numbers,
    attempt=st.sampled_from([NO_ATTEMPT, MINE, OTHER]),
    pending=st.booleans(),
)
def test_any_history_makes_sense(
    *,
    committed: int,
    back: int,
    retained: dict[int, int],
    server: int,
    applied: int,
    known: int,
    attempt: bytes,
    pending: bool,
) -> None:
    chain = {number: min(since, number - 1) for number, since in retained.items()}
    where = position(
        committed,
        max(0, committed - back),
        applied=at(min(known, committed)),
        pending=Pending(at(committed + 1), MINE, whole=True) if pending else None,
    )
    decision = decide(where, chain, stream(at(server), attempt, at(applied), attempt))
    if isinstance(decision, Require):
        return
    told = stream(at(server), attempt, at(applied), attempt)
    check(where, chain, told)


KEY = WatermarkKey(bytes(32), MACHINE)


def test_what_the_applier_did_not_write_says_nothing() -> None:
    claims = Watermark(
        MACHINE,
        applied=at(9),
        attempt=OTHER,
        repair=Repair(7, (RepairRun(0, 1, 1),)),
        lost="everything",
        lost_generation=GENERATION,
        sums=b"b" * 16,
    )
    genuine = StreamState(at(5), MINE, 3, 4, claims.signed(KEY))
    assert believed(genuine, KEY) == (genuine, False)
    other_key, other_machine = (
        WatermarkKey(b"x" * 32, MACHINE),
        WatermarkKey(bytes(32), uuid.uuid4()),
    )
    bent = replace(claims.signed(KEY), applied=at(10))
    for strange in (claims, claims.signed(other_key), claims.signed(other_machine), bent):
        stream, is_strange = believed(StreamState(at(5), MINE, 3, 4, strange), KEY)
        assert is_strange
        assert stream == StreamState(at(5), MINE, 3, 4, Watermark(MACHINE))
        assert decide(position(5), {}, stream) == GoOn()
    elsewhere = replace(claims, machine=uuid.uuid4())
    assert believed(StreamState(at(5), MINE, 3, 4, elsewhere.signed(KEY)), KEY)[1]


def test_no_watermark_at_all_is_nothing_strange() -> None:
    stream = StreamState(at(5), MINE, 3, 4, Watermark(MACHINE))
    assert believed(stream, KEY) == (stream, False)


@pytest.mark.parametrize(
    ("told", "cause"),
    [
        ("integrity", ResyncCause.INTEGRITY),
        ("stream-lost", ResyncCause.STREAM_LOST),
        ("", ResyncCause.STREAM_LOST),
        ("news", ResyncCause.STREAM_LOST),
    ],
)
def test_cause_of_a_loss_is_what_the_applier_says(told: str, cause: ResyncCause) -> None:
    lost = stream(at(5), applied=at(4), lost=GENERATION)
    said = replace(lost, watermark=replace(lost.watermark, lost_cause=told))
    decision = decide(position(5), {5: 4}, said)
    assert isinstance(decision, Require)
    assert decision.cause is cause

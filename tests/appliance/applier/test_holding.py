"""Which point a hold takes, and how long it stays."""

import errno
import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.applier.holding import Answer, Holder, Wish, answer_of, choose, remaining
from appliance.applier.store.catalogue import Chain
from appliance.applier.store.holds import HeldPosition, read_holds
from appliance.applier.store.model import Point
from appliance.applier.store.point_names import point_name
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.control.recovery import Hold, PointChoice
from tests.appliance.applier.store.recorded_machine import MACHINE, RecordedMachine

NONE, CRASH, APP = Consistency.NONE, Consistency.CRASH, Consistency.APP
IDS = [uuid.UUID(int=number) for number in range(1, 6)]


def a_point(position: int, consistency: Consistency, stamp: Stamp | None = None) -> Point:
    return Point(
        position=position,
        bookmark=Bookmark(stamp or Stamp(1, position), position * 10**9, consistency, "why"),
        attempt=b"a" * 16,
        applied_ns=position,
        changed_bytes=0,
        verified_ns=None,
        disks=(DiskShape(0, "sda", 4096),),
    )


def a_chain(*kinds: Consistency, folding_to: int | None = None) -> Chain:
    points = tuple(a_point(nth, kind) for nth, kind in enumerate(kinds, 1))
    return Chain(MACHINE, "web", 0, folding_to, (), points)


def a_hold(choice: str, number: int = 0, *, generation: int | None = None) -> Hold:
    generation = int(number > 0) if generation is None else generation
    return Hold(
        id=uuid.uuid4(), machine=MACHINE, choice=choice, generation=generation, number=number
    )


def chosen(choice: str, chain: Chain, number: int = 0) -> int:
    answer = choose(a_hold(choice, number), chain)
    assert answer.state == "held"
    assert answer.point is not None
    return answer.point.position


def test_each_choice_takes_its_point() -> None:
    chain = a_chain(CRASH, APP, CRASH, CRASH, NONE)
    assert chosen(PointChoice.LATEST_PROCESSED, chain) == 4
    assert chosen(PointChoice.LATEST_APP_CONSISTENT, chain) == 2
    assert chosen(PointChoice.LATEST, chain) == 4
    assert chosen(PointChoice.LATEST, chain, 3) == 4
    assert chosen(point_name(chain.points[2]), chain) == 3


def test_latest_waits_and_tells_what_is_applied_and_what_is_awaited() -> None:
    late = choose(a_hold(PointChoice.LATEST, 7), a_chain(CRASH, CRASH))
    assert (late.state, late.reason) == (
        "waiting",
        "changeset 1.2 is applied, 1.7 or newer is awaited",
    )
    none = choose(a_hold(PointChoice.LATEST, 7), a_chain())
    assert (none.state, none.reason) == (
        "waiting",
        "nothing is applied yet, 1.7 or newer is awaited",
    )
    torn = choose(a_hold(PointChoice.LATEST, 2), a_chain(CRASH, NONE, NONE))
    assert torn.state == "waiting"
    assert "1.3 is applied, and no point from 1.2 on is consistent" in torn.reason


def test_latest_takes_what_a_newer_generation_begins_only_when_it_is_consistent() -> None:
    begun = a_point(3, NONE, Stamp(2, 1))
    chain = replace(a_chain(CRASH, CRASH), points=(*a_chain(CRASH, CRASH).points, begun))
    assert choose(a_hold(PointChoice.LATEST, 5), chain).state == "waiting"
    whole = replace(chain, points=(*chain.points, a_point(4, CRASH, Stamp(2, 2))))
    assert chosen(PointChoice.LATEST, whole, 5) == 4


@pytest.mark.parametrize(
    ("choice", "chain", "reason"),
    [
        (PointChoice.LATEST_PROCESSED, a_chain(), "no recovery point: nothing of it is applied"),
        (PointChoice.LATEST, a_chain(NONE), "up to 1.1 nothing that is applied is consistent"),
        (PointChoice.LATEST_APP_CONSISTENT, a_chain(), "no recovery point"),
        (PointChoice.LATEST_APP_CONSISTENT, a_chain(CRASH, CRASH), "none of the 2 .* app-consist"),
        ("1999-01-01T00:00:00Z-00000001", a_chain(CRASH), "no point 1999.* are 1970.*-00000001"),
        ("1999-01-01T00:00:00Z-00000001", a_chain(), "no point 1999.*: the machine has no reco"),
        (point_name(a_point(2, NONE)), a_chain(CRASH, NONE), r"not consistent .* \(why\)"),
    ],
)
def test_what_cannot_be_held_is_refused_with_its_reason(
    choice: str, chain: Chain, reason: str
) -> None:
    answer = choose(a_hold(choice), chain)
    assert answer.state == "refused"
    assert re.search(reason, answer.reason), answer.reason


def test_a_point_that_is_being_folded_away_is_not_taken() -> None:
    chain = a_chain(CRASH, CRASH, CRASH, folding_to=2)
    answer = choose(a_hold(point_name(chain.points[0])), chain)
    assert (answer.state, answer.point) == ("waiting", None)
    assert chosen(point_name(chain.points[1]), chain) == 2


@given(
    st.lists(st.sampled_from(list(Consistency)), max_size=12),
    st.integers(0, 14),
    st.sampled_from([*PointChoice, point_name(a_point(3, CRASH))]),
    st.none() | st.integers(1, 12),
)
def test_only_what_can_be_restored_is_ever_held(
    kinds: Sequence[Consistency], number: int, choice: str, folding_to: int | None
) -> None:
    chain = a_chain(*kinds, folding_to=folding_to)
    answer = choose(a_hold(choice, number), chain)
    if answer.point is None:
        assert answer.reason
        assert answer.state in ("waiting", "refused")
        return
    assert answer.state == "held"
    assert answer.point in chain.points
    assert answer.point.bookmark.consistency.restorable
    assert answer.point.position >= (folding_to or 0)
    newer = chain.points[answer.point.position :]
    if choice == PointChoice.LATEST:
        assert answer.point.bookmark.stamp >= Stamp(int(number > 0), number)
    if choice in (PointChoice.LATEST, PointChoice.LATEST_PROCESSED):
        assert not any(point.bookmark.consistency.restorable for point in newer)
    if choice == PointChoice.LATEST_APP_CONSISTENT:
        assert answer.point.bookmark.consistency is APP
        assert not any(point.bookmark.consistency is APP for point in newer)


held_positions = st.builds(
    HeldPosition,
    id=st.sampled_from(IDS),
    position=st.integers(1, 9),
    stamp=st.just(Stamp(1, 1)),
    attempt=st.just(b"a" * 16),
    until_ns=st.integers(0, 20),
    held_ns=st.just(0),
)
holds = st.builds(
    Hold,
    id=st.sampled_from(IDS),
    machine=st.just(MACHINE),
    choice=st.just("latest"),
    until_ns=st.integers(0, 20),
)


@given(
    st.lists(held_positions, unique_by=lambda one: one.id),
    st.lists(holds, unique_by=lambda one: one.id),
    st.booleans(),
    st.integers(0, 20),
)
def test_a_hold_ends_when_it_is_named_no_more_and_its_lock_is_over(
    kept: list[HeldPosition], named: list[Hold], may_end: bool, now_ns: int
) -> None:
    left = {one.id: one for one in remaining(kept, Wish(tuple(named), may_end), now_ns)}
    by_id = {hold.id: hold for hold in named}
    for one in kept:
        hold = by_id.get(one.id)
        ends = may_end and hold is None and one.until_ns <= now_ns
        assert (one.id in left) is not ends
        if not ends:
            until_ns = max(one.until_ns, hold.until_ns if hold else 0)
            assert left[one.id] == replace(one, until_ns=until_ns)
    assert left.keys() <= {one.id for one in kept}


def test_a_holder_writes_down_first_and_chooses_once(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24,))
    latest, processed = a_hold(PointChoice.LATEST, 3), a_hold(PointChoice.LATEST_PROCESSED)
    wish = Wish((latest, processed), may_end=True)
    with machine.open() as store:
        holder = Holder(store)
        machine.apply(store)
        assert not holder.is_settled(wish)
        assert holder.tend(wish, 5)
        assert not holder.is_settled(wish)
        assert holder.answers[latest.id].state == "waiting"
        machine.apply(store)
        assert not holder.tend(wish, 6)  # the same state, with another reason
        assert "1.2 is applied" in holder.answers[latest.id].reason
        machine.apply(store)
        assert holder.tend(wish, 7)
        assert holder.is_settled(wish)
        machine.apply(store)
        found = {held.id: held.position for held in read_holds(store.folder)}
        assert found == {processed.id: 1, latest.id: 3}
        longer = Wish((processed.model_copy(update={"until_ns": 90}),), may_end=True)
        assert not holder.is_settled(longer)
        assert holder.tend(longer, 8)
        assert not holder.is_settled(Wish((), may_end=True))
        holder.tend(Wish((), may_end=True), 50)
        assert [held.until_ns for held in read_holds(store.folder)] == [90]
    with machine.open() as store:
        holder = Holder(store)
        holder.tend(Wish((), may_end=False), 99)
        assert len(read_holds(store.folder)) == 1
        over = Wish((), may_end=True)
        holder.tend(over, 99)
        assert read_holds(store.folder) == ()
        assert holder.is_settled(over)


def test_a_hold_that_cannot_be_written_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24,))
    with machine.open() as store:
        machine.apply(store)
        holder = Holder(store)
        first, second = (a_hold(PointChoice.LATEST_PROCESSED) for _ in range(2))
        holder.tend(Wish((first,)), 1)
        with monkeypatch.context() as patch:
            patch.setattr("os.rename", _full)
            holder.tend(Wish((first, second)), 2)
        assert holder.answers[first.id].state == "held"
        assert holder.answers[second.id].state == "waiting"
        assert "No space left" in holder.answers[second.id].reason
        assert len(read_holds(store.folder)) == 1
        assert holder.tend(Wish((first, second)), 3)
        assert holder.answers[second.id].state == "held"


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_held_position_that_the_store_has_no_more_is_told() -> None:
    chain = a_chain(CRASH, CRASH)
    held = HeldPosition(uuid.uuid4(), 2, Stamp(1, 2), b"a" * 16, 0, 0)
    assert answer_of(held, chain) == Answer("held", point=chain.points[1])
    for other in (replace(held, position=3), replace(held, attempt=b"b" * 16)):
        assert answer_of(other, chain).state == "refused"
        assert "put back" in answer_of(other, chain).reason

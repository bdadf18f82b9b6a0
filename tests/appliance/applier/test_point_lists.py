import time
import uuid
from dataclasses import replace
from pathlib import Path

from appliance.applier.holding import Holder, Wish
from appliance.applier.point_lists import (
    LIST_BYTES_MAX,
    list_points,
    machines_with_points,
    read_list,
)
from appliance.applier.store.holds import HeldPosition
from appliance.applier.store.point_names import point_name
from replication.bookmark import Bookmark, Consistency, Stamp
from replication.control.recovery import POINTS_MAX, PointChoice, PointList
from tests.appliance.applier.store.recorded_machine import MACHINE, RecordedMachine
from tests.appliance.applier.test_holding import APP, CRASH, NONE, a_chain, a_hold, a_point


def test_a_list_tells_what_is_verified_held_and_locked(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24,))
    hold = a_hold(PointChoice.LATEST_PROCESSED)
    lock = a_hold(PointChoice.LATEST_PROCESSED).model_copy(update={"until_ns": 1 << 62})
    with machine.open() as store:
        machine.apply(store)
        Holder(store).tend(Wish((hold,)), 1)
        machine.apply(store, consistency=Consistency.NONE)
        machine.apply(store, consistency=Consistency.APP)
        Holder(store).tend(Wish((hold, lock)), 1)
        machine.apply(store)
        store.verify(4)
        chain = store.chain()
    told = read_list(machine.root, MACHINE)
    assert PointList.model_validate_json(told.model_dump_json()) == told
    assert told.machine == MACHINE
    assert told.space_bytes > 4 * 4096
    assert [one.name for one in told.points] == [
        point_name(point) for point in chain.points if point.position != 2
    ]
    assert [one.consistency for one in told.points] == ["crash", "app", "crash"]
    assert [(one.held, one.locked_until_ns) for one in told.points] == [
        (True, 0),
        (False, 1 << 62),
        (False, 0),
    ]
    assert [one.verified_ns > 0 for one in told.points] == [False, False, True]
    assert [one.changed_bytes for one in told.points] == [
        point.changed_bytes for point in chain.points if point.position != 2
    ]


def test_a_list_is_of_recovery_points_alone_and_of_the_newest_where_they_are_many() -> None:
    chain = a_chain(CRASH, NONE, APP, CRASH, folding_to=3)
    made = list_points(MACHINE, chain, (), now_ns=0)
    assert [one.position for one in made.points] == [3, 4]
    reason = "ä" * 300
    points = []
    for position in range(1, POINTS_MAX + 11):
        point = a_point(position, CRASH)
        bookmark = Bookmark(Stamp(1, position), position * 10**9, CRASH, reason)
        points.append(replace(point, bookmark=bookmark))
    made = list_points(MACHINE, replace(chain, folding_to=None, points=tuple(points)), (), now_ns=0)
    assert len(made.model_dump_json().encode()) <= LIST_BYTES_MAX
    assert 1000 < len(made.points) <= POINTS_MAX
    assert made.points[-1].position == POINTS_MAX + 10
    assert made.points[0].position == POINTS_MAX + 11 - len(made.points)


def test_a_thousand_points_are_listed_at_once() -> None:
    chain = a_chain(*[CRASH] * 1000)
    point = chain.points[7]
    holds = [
        HeldPosition(uuid.uuid4(), 8, point.bookmark.stamp, point.attempt, 0, 0)
        for _ in range(1000)
    ]
    began = time.process_time()
    made = list_points(MACHINE, chain, holds, now_ns=0)
    assert time.process_time() - began < 0.5
    assert len(made.points) == 1000
    assert [one.position for one in made.points if one.held] == [8]


def test_machines_of_which_there_is_nothing_have_no_list(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24,))
    with machine.open():
        pass
    assert machines_with_points(machine.root, [uuid.uuid4(), MACHINE]) == [MACHINE]

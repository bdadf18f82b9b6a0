from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.applier.retention import RetentionPolicy
from appliance.applier.store import MachineStore
from replication.bookmark import Consistency
from tests.appliance.applier.store.recorded_machine import (
    SECOND_NS,
    START_NS,
    RecordedMachine,
    assert_equals_images,
)

HOUR_NS = 3600 * SECOND_NS
DAY = RetentionPolicy(retention_days=1)


@pytest.fixture
def machine(tmp_path: Path) -> RecordedMachine:
    return RecordedMachine(str(tmp_path))


@pytest.fixture
def store(machine: RecordedMachine) -> Iterator[MachineStore]:
    with machine.open() as opened:
        yield opened


def positions(store: MachineStore) -> list[int]:
    return [point.position for point in store.points()]


def test_points_of_a_minute_become_one_per_five_minutes(
    machine: RecordedMachine, store: MachineStore
) -> None:
    for _ in range(30):
        machine.apply(store, writes=3)
    report = store.thin(START_NS + HOUR_NS, DAY)
    assert len(report.merged) in (5, 6)
    times = [p.bookmark.time_ns // (300 * SECOND_NS) for p in store.points()]
    assert len(set(times)) in (6, 7)
    assert positions(store)[-1] == 30
    assert_equals_images(store, machine)
    again = store.thin(START_NS + HOUR_NS, DAY)
    assert (again.merged, again.folded) == ([], [])


def test_points_past_the_window_are_folded(machine: RecordedMachine, store: MachineStore) -> None:
    for hour in range(40):
        machine.apply(store, writes=3, time_ns=START_NS + hour * HOUR_NS)
    report = store.thin(START_NS + 40 * HOUR_NS, DAY)
    assert positions(store) == list(range(16, 41))
    assert store.chain().base_position == 16
    assert report.folded == list(range(1, 17))
    assert report.deferred == []
    assert_equals_images(store, machine)


def test_layers_before_the_first_consistent_point_are_folded_at_once(
    machine: RecordedMachine, store: MachineStore
) -> None:
    for _ in range(4):
        machine.apply(store, consistency=Consistency.NONE)
    store.thin(START_NS, DAY)
    assert store.chain().base_position == 4
    assert positions(store) == []
    machine.apply(store)
    store.thin(START_NS, DAY)
    assert positions(store) == [5]
    assert_equals_images(store, machine)


def test_inconsistent_layers_wait_for_the_next_restorable_point(
    machine: RecordedMachine, store: MachineStore
) -> None:
    machine.apply(store, time_ns=START_NS)
    for _ in range(3):
        machine.apply(store, consistency=Consistency.NONE, time_ns=START_NS + HOUR_NS // 2)
    assert store.thin(START_NS + HOUR_NS, DAY).merged == []
    machine.apply(store, time_ns=START_NS + HOUR_NS // 2)
    machine.apply(store, time_ns=START_NS + HOUR_NS)
    assert store.thin(START_NS + HOUR_NS, DAY).merged == [(2, 5)]
    assert positions(store) == [1, 5, 6]
    assert_equals_images(store, machine)


def test_a_reader_defers_the_fold_and_nothing_else(
    machine: RecordedMachine, store: MachineStore
) -> None:
    for hour in range(30):
        machine.apply(store, writes=3, time_ns=START_NS + hour * HOUR_NS)
    with store.open_view(2, 0) as view:
        report = store.thin(START_NS + 30 * HOUR_NS, DAY)
        assert store.chain().base_position == 2
        assert "being read" in report.deferred[0]
        assert view.read(0, view.size_bytes) == machine.images[2][0]
    assert store.thin(START_NS + 30 * HOUR_NS, DAY).deferred == []
    assert_equals_images(store, machine)


def test_one_call_does_a_bounded_piece_of_work(
    machine: RecordedMachine, store: MachineStore
) -> None:
    for hour in range(30):
        machine.apply(store, writes=3, time_ns=START_NS + hour * HOUR_NS)
    first = store.thin(START_NS + 30 * HOUR_NS, DAY, bytes_max=1)
    assert first.folded == [1]
    for _ in range(10):
        store.thin(START_NS + 30 * HOUR_NS, DAY, bytes_max=1)
    assert positions(store)[0] == 6
    assert_equals_images(store, machine)

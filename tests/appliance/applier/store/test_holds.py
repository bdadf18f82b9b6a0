"""Held positions stay: whatever is thinned, merged or folded, and whoever is killed."""

import os
import random
import shutil
import threading
import uuid
from pathlib import Path

import pytest

from appliance.applier.retention import RetentionPolicy
from appliance.applier.store import MachineStore
from appliance.applier.store.holds import (
    HELD_MAX,
    NAME,
    HeldPosition,
    Mark,
    marks_of,
    read_holds,
)
from appliance.applier.store.reader_store import machine_folder
from replication.bookmark import Consistency
from replication.errors import IntegrityError, LimitError, UnavailableError
from tests.appliance.applier.store.recorded_machine import (
    MACHINE,
    SECOND_NS,
    START_NS,
    RecordedMachine,
    assert_equals_images,
    content,
)
from tests.appliance.applier.store.test_crash import KILLS_MAX, leave_in_log, run_killed

HOUR_NS = 3600 * SECOND_NS
LATEST_ALONE = RetentionPolicy(retention_days=0)


def hold(store: MachineStore, position: int, *, until_ns: int = 0) -> HeldPosition:
    """Hold a position that is there."""
    with store.holds.deciding():
        point = store.chain().point(position)
        assert point is not None
        held = HeldPosition(
            uuid.uuid4(), position, point.bookmark.stamp, point.attempt, until_ns, START_NS
        )
        store.holds.replace((*store.holds.holds, held))
    return held


def let_go(store: MachineStore, held: HeldPosition) -> None:
    with store.holds.deciding():
        store.holds.replace(one for one in store.holds.holds if one != held)


def positions(store: MachineStore) -> list[int]:
    return [point.position for point in store.points()]


def thinned(held: set[int], newest: int) -> list[int]:
    """What thinning to the latest alone leaves: the newest point's layers stay apart at first."""
    below = max((position for position in held if position < newest), default=newest)
    return sorted({*held, newest, *range(below, newest)})


@pytest.fixture
def machine(tmp_path: Path) -> RecordedMachine:
    return RecordedMachine(str(tmp_path), sizes=(24, 9))


def test_held_positions_are_neither_merged_away_nor_folded(machine: RecordedMachine) -> None:
    with machine.open() as store:
        for _ in range(8):
            machine.apply(store)
        held = [hold(store, 3), hold(store, 5), hold(store, 5, until_ns=1)]
        for first, last in ((2, 4), (5, 8), (1, 8)):
            with pytest.raises(UnavailableError, match=r"position [35] .* is held"):
                store.merge(first, last)
        with pytest.raises(UnavailableError, match=r"position 3 .* is held"):
            store.fold_to(4)
        assert_equals_images(store, machine)
        assert not list(Path(store.folder, "incoming").iterdir())
        report = store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        assert report.deferred == []
        assert positions(store) == thinned({3, 5}, 8)
        let_go(store, held[0])
        let_go(store, held[1])
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        assert positions(store) == thinned({5}, 8)
        assert store.chain().base_position == 5
        let_go(store, held[2])
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        assert positions(store) == [8]
        assert_equals_images(store, machine)


def test_a_hold_outlives_a_restart_a_new_generation_and_a_rebuilt_catalogue(
    machine: RecordedMachine,
) -> None:
    with machine.open() as store:
        for _ in range(4):
            machine.apply(store)
        held = hold(store, 2, until_ns=7)
    with machine.open() as store:
        assert store.holds.holds == (held,)
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        machine.generation, machine.number = 2, 0
        machine.resize(0, 12)
        for _ in range(4):
            machine.apply(store)
        other = hold(store, 7)
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        assert positions(store) == [2, 7, 8]
    with MachineStore.rebuild(machine.root, MACHINE) as store:
        assert store.holds.holds == (held, other)
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        assert positions(store) == [2, 7, 8]
        assert_equals_images(store, machine)


def test_a_rebuild_prefers_the_layers_that_leave_a_held_position(machine: RecordedMachine) -> None:
    """A merge was cut short after its layer had its name, then a position within was held."""
    layers = Path(machine_folder(machine.root, MACHINE), "layers")
    with machine.open() as store:
        for _ in range(5):
            machine.apply(store)
        hold(store, 3)
    aside = layers.parent.with_name("aside")
    shutil.copytree(layers.parent, aside)
    with machine.open() as store:
        store.holds.replace(())
        store.merge(2, 4)
    merged = (layers / "000000000002-000000000004.layer").read_bytes()
    shutil.rmtree(layers.parent)
    aside.rename(layers.parent)
    (layers / "000000000002-000000000004.layer").write_bytes(merged)
    with MachineStore.rebuild(machine.root, MACHINE) as store:
        assert positions(store) == [1, 2, 3, 4, 5]
        assert_equals_images(store, machine)
    (layers / "000000000003-000000000003.layer").unlink()
    (layers / "000000000002-000000000004.layer").write_bytes(merged)
    with MachineStore.rebuild(machine.root, MACHINE) as store:  # better than to lose the newest
        assert positions(store) == [1, 4, 5]
        assert_equals_images(store, machine)


def test_another_position_in_the_place_of_a_held_one_is_not_held(machine: RecordedMachine) -> None:
    with machine.open() as store:
        machine.apply(store)
        held = hold(store, 1)
    file = Path(machine_folder(machine.root, MACHINE), NAME).read_bytes()
    shutil.rmtree(machine_folder(machine.root, MACHINE))
    anew = RecordedMachine(machine.root, seed=2, sizes=(24, 9))
    anew.attempt = b"b" * 16
    with anew.open():
        pass
    Path(machine_folder(machine.root, MACHINE), NAME).write_bytes(file)
    with anew.open() as store:
        for _ in range(3):
            anew.apply(store)
        assert store.holds.holds == (held,)
        assert store.holds.positions(store.chain()) == frozenset()
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        assert positions(store) == [3]


def test_a_point_that_is_read_and_held_stays_while_all_others_go(machine: RecordedMachine) -> None:
    with machine.open() as store:
        for _ in range(6):
            machine.apply(store)
        held = hold(store, 3)
        with store.reader.open_view(3, 0) as view:
            for _ in range(3):
                store.thin(START_NS + HOUR_NS, LATEST_ALONE)
                machine.apply(store)
            assert store.chain().base_position == 3
            let_go(store, held)
            assert "being read" in store.thin(START_NS + HOUR_NS, LATEST_ALONE).deferred[0]
            assert view.read(0, view.size_bytes) == machine.images[3][0]
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        assert positions(store) == [9]


def test_whatever_is_done_in_whatever_order_held_positions_stay(tmp_path: Path) -> None:
    for seed in range(8):
        rng = random.Random(seed)
        machine = RecordedMachine(str(tmp_path / str(seed)), seed=seed, sizes=(24, 9))
        store = machine.open()
        held: list[HeldPosition] = []
        for _ in range(40):
            act = rng.choice(("apply", "apply", "apply", "hold", "let go", "thin", "merge", "fold"))
            here = positions(store)
            rows = store.chain().layers
            if act == "apply":
                consistency = rng.choice(list(Consistency))
                machine.apply(store, writes=3, consistency=consistency)
            elif act == "hold" and here:
                held.append(hold(store, rng.choice(here)))
            elif act == "let go" and held:
                let_go(store, held.pop(rng.randrange(len(held))))
            elif act == "thin":
                keeping = rng.choice((LATEST_ALONE, RetentionPolicy()))
                store.thin(START_NS + rng.randrange(3) * HOUR_NS, keeping)
            elif act in ("merge", "fold") and rows:
                first = rng.choice(rows).first
                last = max(first, rng.choice(rows).last)
                last = next(row.last for row in rows if row.last >= last)
                try:
                    store.fold_to(last) if act == "fold" else store.merge(first, last)
                except UnavailableError as error:
                    assert "is held" in str(error)  # noqa: PT017
            assert {one.position for one in held} <= set(positions(store))
        for one in held:
            assert content(store, one.position) == machine.images[one.position]
        assert_equals_images(store, machine)
        store.close()


def test_holding_while_another_thread_thins(machine: RecordedMachine) -> None:
    """Whatever was held is there until it is let go, however the two meet."""
    with machine.open() as store:
        rng = random.Random(3)
        stop = threading.Event()
        failures: list[BaseException] = []
        rounds = 0

        def thin() -> None:
            nonlocal rounds
            try:
                while not stop.is_set():
                    store.thin(START_NS + HOUR_NS, LATEST_ALONE)
                    rounds += 1
            except BaseException as error:  # noqa: BLE001
                failures.append(error)

        thread = threading.Thread(target=thin)
        thread.start()
        held: list[HeldPosition] = []
        try:
            while len(machine.images) < 80:
                machine.apply(store, writes=3)
                with store.holds.deciding():
                    chain = store.chain()
                    floor = chain.folding_to or 0
                    here = [at for at in positions(store) if at >= floor]
                    held.append(hold(store, rng.choice(here)))
                if len(held) > 4:
                    one = held.pop(rng.randrange(len(held)))
                    assert content(store.reader, one.position) == machine.images[one.position]
                    let_go(store, one)
        finally:
            stop.set()
            thread.join(60)
        assert failures == []
        assert rounds > 3
        assert_equals_images(store, machine)
        store.thin(START_NS + HOUR_NS, LATEST_ALONE)
        # What was held for a while only has shaped how the layers beside it were merged.
        kept = {one.position for one in held}
        assert kept | {80} <= set(positions(store)) <= set(thinned(kept, 80))


def begin_hold(machine: RecordedMachine, store: MachineStore) -> None:
    hold(store, 3)
    Path(machine.root, "told").touch()


def end_hold(machine: RecordedMachine, store: MachineStore) -> None:
    let_go(store, store.holds.holds[0])
    store.merge(2, 4)


def hold_and_thin(machine: RecordedMachine, store: MachineStore) -> None:
    begin_hold(machine, store)
    store.thin(START_NS + HOUR_NS, LATEST_ALONE)


@pytest.mark.parametrize("act", [begin_hold, end_hold, hold_and_thin])
def test_killed_at_any_step_what_was_told_is_held(tmp_path: Path, act: object) -> None:
    kept = tmp_path / "kept"
    machine = RecordedMachine(str(kept), sizes=(24, 9))
    with machine.open() as store:
        for _ in range(5):
            machine.apply(store)
        hold(store, 2)
    for nth in range(0, KILLS_MAX, 1 if act is begin_hold else 3):
        machine.root = str(tmp_path / f"killed-{nth}")
        shutil.copytree(kept, machine.root)
        finished = run_killed(machine, act, nth)  # type: ignore[arg-type]
        with machine.open() as store:
            held = {one.position for one in store.holds.holds}
            if act is end_hold:
                assert held in ({2}, set())
            else:
                assert held in ({2}, {2, 3})
                assert 3 in held or not Path(machine.root, "told").exists()
            assert held <= set(positions(store))
            assert_equals_images(store, machine)
            store.thin(START_NS + HOUR_NS, LATEST_ALONE)
            assert positions(store) == thinned(held, 5)
        shutil.rmtree(machine.root)
        if finished:
            break
    else:
        pytest.fail(f"not finished after {KILLS_MAX} kills")
    assert nth >= 3


def test_a_rebuild_that_is_killed_keeps_what_is_held(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path / "kept"), sizes=(24, 9))
    with machine.open() as store:
        for _ in range(6):
            machine.apply(store)
        hold(store, 4)
    leave_in_log(machine, lambda store: store.thin(START_NS + HOUR_NS, LATEST_ALONE))
    for nth in range(0, KILLS_MAX, 3):
        machine.root = str(tmp_path / f"killed-{nth}")
        shutil.copytree(tmp_path / "kept", machine.root)
        finished = run_killed(machine, rebuild, nth)
        with machine.open() as store:
            assert positions(store) == [4, 5, 6]
            assert_equals_images(store, machine)
        shutil.rmtree(machine.root)
        if finished:
            return
    pytest.fail(f"not finished after {KILLS_MAX} kills")


def rebuild(machine: RecordedMachine, store: MachineStore) -> None:
    store.close()
    MachineStore.rebuild(machine.root, MACHINE).close()


def test_a_damaged_file_is_refused_and_nothing_goes(machine: RecordedMachine) -> None:
    with machine.open() as store:
        for _ in range(3):
            machine.apply(store)
        hold(store, 1)
    path = Path(machine_folder(machine.root, MACHINE), NAME)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole.replace(b'"position": 1', b'"position": 2'), b"", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(IntegrityError, match=r"holds\.json"):
            machine.open()
    path.write_bytes(whole)
    with machine.open() as store:
        assert positions(store) == [1, 2, 3]
        assert [one.position for one in store.holds.holds] == [1]


def test_more_holds_than_fit_are_refused_and_the_others_stay(machine: RecordedMachine) -> None:
    with machine.open() as store:
        machine.apply(store)
        held = hold(store, 1)
        many = [
            HeldPosition(uuid.uuid4(), 1, held.stamp, held.attempt, 0, 0) for _ in range(HELD_MAX)
        ]
        with pytest.raises(LimitError, match=str(HELD_MAX)):
            store.holds.replace((held, *many))
        assert store.holds.holds == read_holds(store.folder) == (held,)
        store.holds.replace(many)
        assert len(read_holds(store.folder)) == HELD_MAX


def test_marks_tell_what_is_held_and_what_is_locked(machine: RecordedMachine) -> None:
    with machine.open() as store:
        for _ in range(5):
            machine.apply(store)
        for position, until_ns in ((1, 0), (2, 9), (3, 0), (3, 9), (3, 12), (4, 3)):
            hold(store, position, until_ns=until_ns)
        marks = marks_of(store.points(), store.holds.holds, 5)
        assert marks == {
            1: Mark(held=True),
            2: Mark(held=False, locked_until_ns=9),
            3: Mark(held=True, locked_until_ns=12),
            4: Mark(held=True),  # the lock is over, and it is still wanted
        }
    assert os.listdir(Path(machine_folder(machine.root, MACHINE), "incoming")) == []

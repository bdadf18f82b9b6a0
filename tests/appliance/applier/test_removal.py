"""Points that are held or locked are not removed, whoever asks."""

import uuid
from pathlib import Path

import pytest

from appliance.applier.removal import check_removable, remove_store
from appliance.applier.store.holds import NAME
from appliance.applier.store.reader_store import machine_folder
from replication.errors import ConflictError, IntegrityError
from tests.appliance.applier.store.recorded_machine import MACHINE, RecordedMachine
from tests.appliance.applier.store.test_holds import hold

FAR_NS = 4_000_000_000 * 10**9


@pytest.fixture
def machine(tmp_path: Path) -> RecordedMachine:
    made = RecordedMachine(str(tmp_path), sizes=(24,))
    with made.open() as store:
        made.apply(store)
    return made


def test_a_lock_that_is_not_over_keeps_the_store(machine: RecordedMachine) -> None:
    with machine.open() as store:
        hold(store, 1)
        hold(store, 1, until_ns=FAR_NS)
    for act in (check_removable, remove_store):
        with pytest.raises(ConflictError, match="one is locked until 2096-10-02T07:06:40Z"):
            act(machine.root, MACHINE)
    with machine.open() as store:
        assert [point.position for point in store.points()] == [1]
        store.holds.replace(())
    remove_store(machine.root, MACHINE)
    assert not Path(machine_folder(machine.root, MACHINE)).exists()


def test_a_hold_keeps_the_store_as_long_as_it_is_wanted(machine: RecordedMachine) -> None:
    with machine.open() as store:
        held = hold(store, 1, until_ns=1)
    with pytest.raises(ConflictError, match="one is held"):
        remove_store(machine.root, MACHINE, {held.id})
    remove_store(machine.root, MACHINE, {uuid.uuid4()})
    assert not Path(machine_folder(machine.root, MACHINE)).exists()


def test_where_nobody_can_tell_what_is_held_nothing_is_removed(machine: RecordedMachine) -> None:
    Path(machine_folder(machine.root, MACHINE), NAME).write_bytes(b"torn")
    with pytest.raises(IntegrityError, match=r"holds\.json"):
        remove_store(machine.root, MACHINE)
    assert Path(machine_folder(machine.root, MACHINE)).exists()


def test_a_machine_of_which_there_is_nothing_is_removed(tmp_path: Path) -> None:
    check_removable(str(tmp_path), MACHINE)
    remove_store(str(tmp_path), MACHINE)

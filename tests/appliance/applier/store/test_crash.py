"""A child process is killed by SIGKILL at every single step that writes; nothing is torn after."""

import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.applier.retention import RetentionPolicy
from appliance.applier.store import MachineStore
from appliance.applier.store.catalogue import Catalogue
from appliance.applier.store.reader_store import machine_folder, open_reader
from replication.bookmark import Consistency
from replication.errors import IntegrityError
from tests.appliance.applier.store.recorded_machine import (
    MACHINE,
    SECOND_NS,
    START_NS,
    RecordedMachine,
    assert_equals_images,
)

STEPS = ("rename", "fsync", "unlink", "pwrite", "mkdir", "ftruncate")
KILLS_MAX = 400


def seal(machine: RecordedMachine, store: MachineStore) -> None:
    machine.apply(store)


def merge(machine: RecordedMachine, store: MachineStore) -> None:
    store.merge(2, 4)


def fold(machine: RecordedMachine, store: MachineStore) -> None:
    store.fold_to(2)


def thin(machine: RecordedMachine, store: MachineStore) -> None:
    store.thin(START_NS + 3600 * SECOND_NS, RetentionPolicy())


def rebuild(machine: RecordedMachine, store: MachineStore) -> None:
    store.close()
    MachineStore.rebuild(machine.root, MACHINE).close()


@pytest.mark.parametrize("act", [seal, merge, fold, thin, rebuild])
def test_a_kill_at_any_step_leaves_the_old_state_or_the_new(
    tmp_path: Path, act: Callable[[RecordedMachine, MachineStore], None]
) -> None:
    kept = tmp_path / "kept"
    with RecordedMachine(str(kept)).open():
        pass
    machine = RecordedMachine(str(kept), sizes=(24, 9))
    with machine.open() as store:
        for number in range(5):
            machine.apply(store, consistency=Consistency.NONE if number == 2 else Consistency.APP)
        store.fold_to(1)
    position = machine.position
    outcomes = set()
    for nth in range(KILLS_MAX):
        root = tmp_path / f"killed-{nth}"
        shutil.copytree(kept, root)
        machine.root = str(root)
        finished = run_killed(machine, act, nth)
        if act is seal and nth == 0:
            predict(machine, tmp_path)
        with machine.open() as store:
            assert_equals_images(store, machine)
            head = store.head
            assert head is not None
            assert head.position in ({position, position + 1} if act is seal else {position})
            outcomes.add((head.position, len(store.chain().layers), store.chain().base_position))
            assert not list(Path(store.folder, "incoming").iterdir())
            files = {f"layers/{name}" for name in os.listdir(Path(store.folder, "layers"))}
            assert files == {row.file for row in store.chain().layers}
            assert store.verify() == []
        shutil.rmtree(root)
        if finished:
            break
    else:
        pytest.fail(f"not finished after {KILLS_MAX} kills")
    assert nth > 10
    assert len(outcomes) > 1 or act is rebuild


def predict(machine: RecordedMachine, tmp_path: Path) -> None:
    """Learn, from a copy, the image that the child's changeset makes of the next position."""
    state = machine.random.getstate()
    root = tmp_path / "predicted"
    shutil.copytree(tmp_path / "kept", root)
    kept_root, machine.root = machine.root, str(root)
    position, number = machine.position, machine.number
    with machine.open() as store:
        machine.apply(store)
    machine.root, machine.position, machine.number = kept_root, position, number
    machine.random.setstate(state)


def run_killed(
    machine: RecordedMachine, act: Callable[[RecordedMachine, MachineStore], None], nth: int
) -> bool:
    """Open and act in a child that dies before its ``nth`` writing step; whether it finished."""
    child = os.fork()
    if child == 0:
        try:
            kill_before(nth)
            with machine.open() as store:
                act(machine, store)
            os._exit(0)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.waitstatus_to_exitcode(status) == 0
    return True


def kill_before(nth: int) -> None:
    left = nth

    def count() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            count()
            return real(*given, **named)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))
    run = Catalogue._run

    def counted_run(self: Catalogue, statement: str, *values: Any) -> Any:
        if not statement.startswith(("SELECT", "PRAGMA", "CREATE")):
            count()
        return run(self, statement, *values)

    Catalogue._run = counted_run  # type: ignore[method-assign]


def leave_in_log(machine: RecordedMachine, act: Callable[[MachineStore], object]) -> None:
    """Act in a process that dies with its last transactions in the catalogue's log alone."""
    child = os.fork()
    if child == 0:
        act(machine.open())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert Path(machine_folder(machine.root, MACHINE), "catalogue.sqlite-wal").stat().st_size


def test_a_rebuild_that_is_killed_forgets_no_merge_and_no_fold(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    machine = RecordedMachine(str(kept), sizes=(24, 9))
    with machine.open() as store:
        for _ in range(6):
            machine.apply(store)
    leave_in_log(machine, lambda store: [store.merge(3, 5), store.fold_to(2)])
    for nth in range(KILLS_MAX):
        machine.root = str(tmp_path / f"killed-{nth}")
        shutil.copytree(kept, machine.root)
        child = os.fork()
        if child == 0:
            kill_before(nth)
            MachineStore.rebuild(machine.root, MACHINE).close()
            os._exit(0)
        finished = os.waitpid(child, 0)[1] == 0
        with machine.open() as store:
            assert [point.position for point in store.points()] == [2, 5, 6]
            assert_equals_images(store, machine)
        shutil.rmtree(machine.root)
        if finished:
            break
    else:
        pytest.fail(f"not finished after {KILLS_MAX} kills")
    assert nth > 10


def with_older_catalogue(
    machine: RecordedMachine, act: Callable[[MachineStore], object]
) -> dict[str, bytes]:
    """Act, then put the catalogue back as it was before; return the layers by name."""
    path = Path(machine_folder(machine.root, MACHINE), "catalogue.sqlite")
    older = path.read_bytes()
    with machine.open() as store:
        act(store)
    path.write_bytes(older)
    return {layer.name: layer.read_bytes() for layer in path.parent.joinpath("layers").iterdir()}


def rebuilt_equals(machine: RecordedMachine, positions: list[int]) -> None:
    with MachineStore.rebuild(machine.root, MACHINE) as store:
        assert [point.position for point in store.points()] == positions
        assert_equals_images(store, machine)


def test_layers_that_an_older_catalogue_does_not_know_stay(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24, 9))
    with machine.open() as store:
        for _ in range(5):
            machine.apply(store)
    layers = with_older_catalogue(machine, lambda store: store.merge(2, 4))
    with machine.open() as store, pytest.raises(IntegrityError, match=r"lacks .*-0{11}2\.layer"):
        store.open_view(5, 0)
    there = Path(machine_folder(machine.root, MACHINE), "layers").iterdir()
    assert {layer.name: layer.read_bytes() for layer in there} == layers
    rebuilt_equals(machine, [1, 4, 5])


def test_an_older_catalogue_never_shows_the_base_as_an_older_position(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24, 9))
    with machine.open() as store:
        for _ in range(5):
            machine.apply(store)
        store.fold_to(1)
    with_older_catalogue(machine, lambda store: store.fold_to(3))
    with pytest.raises(IntegrityError, match="moved on to 3"):
        open_reader(machine.root, MACHINE).open_view(1, 0)
    with pytest.raises(IntegrityError, match=r"at position 1, base\.json that it is at 3"):
        machine.open()
    rebuilt_equals(machine, [3, 4, 5])


def test_layers_of_which_nothing_tells_what_they_are_stay(tmp_path: Path) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24, 9))
    with machine.open() as store:
        for _ in range(3):
            machine.apply(store)
        store.fold_to(1)
    folder = Path(machine_folder(machine.root, MACHINE))
    (folder / "catalogue.sqlite").unlink()
    record = (folder / "base.json").read_bytes()
    (folder / "base.json").unlink()
    with pytest.raises(IntegrityError, match="neither catalogue nor"):
        machine.open()
    (folder / "base.json").write_bytes(record)
    rebuilt_equals(machine, [1, 2, 3])

"""``understudy points`` on a store."""

import json
from pathlib import Path

import pytest

from appliance.applier.store.holds import NAME
from appliance.applier.store.reader_store import machine_folder
from appliance.cli.store_points import list_store_points
from tests.appliance.applier.store.recorded_machine import MACHINE, RecordedMachine
from tests.appliance.applier.store.test_holds import hold

UNTIL_NS = 4_000_000_000 * 10**9


def test_points_tell_what_is_verified_held_and_locked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24,))
    with machine.open() as store:
        for _ in range(4):
            machine.apply(store)
        hold(store, 2)
        hold(store, 2, until_ns=UNTIL_NS)
        hold(store, 3, until_ns=UNTIL_NS)
        store.verify(4)
        changed = [point.changed_bytes for point in store.points()]
    list_store_points(str(tmp_path), "web-01", as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert "verified" in lines[0]
    assert "kept" in lines[0]
    locked = "until 2096-10-02 07:06:40Z"
    assert [line.count(locked) for line in lines[1:]] == [0, 1, 1, 0]
    assert [line.count(", in use") for line in lines[1:]] == [0, 1, 0, 0]
    list_store_points(str(tmp_path), "web-01", as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert [(one["held"], one["locked_until_ns"]) for one in told] == [
        (False, None),
        (True, UNTIL_NS),
        (False, UNTIL_NS),
        (False, None),
    ]
    assert [one["verified_ns"] is not None for one in told] == [False, False, False, True]
    assert [one["changed_bytes"] for one in told] == changed


def test_points_are_listed_also_where_nobody_can_tell_what_is_held(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = RecordedMachine(str(tmp_path), sizes=(24,))
    with machine.open() as store:
        machine.apply(store)
    Path(machine_folder(machine.root, MACHINE), NAME).write_bytes(b"torn")
    list_store_points(str(tmp_path), "web-01", as_json=False)
    told = capsys.readouterr()
    assert "-00000001" in told.out
    assert "which of them are held cannot be told" in told.err

"""What each role is told, as a function of rows."""

import uuid
from typing import Any

import pytest

from appliance.config_server.nodes.assignments import (
    FINAL_SECONDS_MAX,
    REMOVED,
    Protected,
    for_applier,
    for_compute,
    for_machine,
    for_process_server,
)
from appliance.config_server.protection.table import RECOVERING, REPLICATING, SENDING, State
from appliance.config_server.protection.transition import KEPT, NO_POINTS, REMOVING
from appliance.config_server.store.recovery_tables import PointHold, RecoveredVm
from appliance.config_server.store.schema import Machine, Node, Policy, ProtectedDisk

ID = uuid.UUID(int=1)
NODE = Node(id=ID, role="machine", name="host", assignment_version=7)
URL = "https://ps.example:9443"
HOUR_NS = 3600 * 10**9


def machine(state: State, *, points: str = KEPT, number: int = 1) -> Machine:
    return Machine(
        id=uuid.UUID(int=number),
        name="web",
        state=state,
        points=points,
        resync_request=3,
        process_server_id=NODE.id,
    )


def policy(window: str = "22:00-06:00") -> Policy:
    return Policy(
        name="gold",
        retention_seconds=7200,
        crash_frequency_seconds=300,
        app_frequency_seconds=3600,
        resync_window=window,
    )


def disk(index: int, *, excluded: bool = False) -> ProtectedDisk:
    return ProtectedDisk(
        machine_id=ID,
        index=index,
        device_id=f"id{index}",
        device=f"/dev/sd{index}",
        name=f"d{index}",
        size_bytes=512,
        excluded=excluded,
    )


def test_an_enrolled_machine_that_nobody_protects_does_nothing() -> None:
    told = for_machine(NODE, None, [], process_server_url="", now_ns=0)
    assert (told.version, told.name, told.protected, told.replicate) == (7, "host", False, False)
    assert told.disks == ()


@pytest.mark.parametrize("state", State)
def test_a_machine_replicates_in_the_states_that_say_so(state: State) -> None:
    told = for_machine(
        NODE, Protected(machine(state), policy()), [disk(0)], process_server_url=URL, now_ns=0
    )
    assert told.protected == bool(told.disks) == (state in REPLICATING | RECOVERING)
    assert told.replicate == (state in SENDING)


def test_a_final_changeset_is_ordered_by_a_number_and_taken_back_by_none() -> None:
    row = machine(State.FAILING_OVER)
    row.final_order = 4
    for wanted, order in ((True, 4), (False, 0)):
        row.final_wanted = wanted
        told = for_machine(
            NODE, Protected(row, policy()), [disk(0)], process_server_url=URL, now_ns=0
        )
        assert (told.final, told.final_seconds_max) == (order, FINAL_SECONDS_MAX)


def test_an_applier_holds_what_stands_and_is_its_own() -> None:
    def hold(number: int, applier: uuid.UUID, ended_ns: int | None = None) -> PointHold:
        return PointHold(
            id=uuid.UUID(int=number),
            machine_id=ID,
            applier_id=applier,
            choice="latest",
            generation=1,
            number=7,
            until_ns=number,
            ended_ns=ended_ns,
        )

    rows = [hold(2, NODE.id), hold(1, NODE.id), hold(3, uuid.uuid4()), hold(4, NODE.id, 1)]
    told = for_applier(NODE, [], rows).holds
    assert [each.id.int for each in told] == [1, 2]
    assert (told[0].machine, told[0].choice, told[0].until_ns) == (ID, "latest", 1)
    assert (told[0].generation, told[0].number) == (1, 7)


def test_a_compute_node_is_told_what_is_to_be_there_and_by_name_what_is_to_go() -> None:
    def vm(number: int, wanted: str, *, compute: uuid.UUID = NODE.id, gone: bool = False) -> Any:
        source = {"index": 0, "name": "sda", "size_bytes": 512, "source": "web/p/disk0.img"}
        return RecoveredVm(
            id=uuid.UUID(int=number),
            machine_id=ID,
            compute_id=compute,
            wanted=wanted,
            document={"name": "web", "network": "n", "disks": [source]},
            independent=number == 1,
            gone_ns=1 if gone else None,
        )

    rows = [
        vm(3, REMOVED),
        vm(2, "on"),
        vm(1, "disks"),
        vm(4, "on", compute=uuid.uuid4()),
        vm(5, REMOVED, gone=True),
    ]
    told = for_compute(NODE, rows)
    assert [(each.id.int, each.power, each.independent) for each in told.vms] == [
        (1, "disks", True),
        (2, "on", False),
    ]
    assert told.vms[0].disks[0].source == "web/p/disk0.img"
    assert [each.int for each in told.removed] == [3]


def test_disks_are_told_in_order_without_the_excluded() -> None:
    told = for_machine(
        NODE,
        Protected(machine(State.PROTECTED), policy()),
        [disk(4), disk(2, excluded=True), disk(0)],
        process_server_url=URL,
        now_ns=0,
    )
    assert [each.index for each in told.disks] == [0, 4]
    assert [each.device for each in told.disks] == ["id0", "id4"]  # names that outlast a restart
    assert told.process_server == URL
    assert told.app_interval_seconds == 3600


def test_without_an_address_to_send_to_a_machine_keeps_its_protection() -> None:
    told = for_machine(
        NODE,
        Protected(machine(State.PROTECTED), policy()),
        [disk(0)],
        process_server_url="",
        now_ns=0,
    )
    assert (told.protected, told.replicate) == (True, False)


@pytest.mark.parametrize(
    ("window", "hour", "allowed"),
    [("22:00-06:00", 23, True), ("22:00-06:00", 12, False), ("always", 12, True)],
)
def test_a_resync_is_allowed_while_the_window_is_open(
    window: str, hour: int, allowed: bool
) -> None:
    told = for_machine(
        NODE,
        Protected(machine(State.RESYNC_REQUIRED), policy(window)),
        [],
        process_server_url=URL,
        now_ns=hour * HOUR_NS,
    )
    assert (told.resync.request, told.resync.allowed) == (3, allowed)


def test_a_process_server_takes_streams_until_protection_has_ended() -> None:
    machines = [machine(state, number=number) for number, state in enumerate(State, 1)]
    told = for_process_server(NODE, machines, ["abc"])
    left_out = {each.id for each in machines} - set(told.machines)
    assert left_out == {each.id for each in machines if each.state == State.UNPROTECTED}
    assert set(told.ended) == left_out
    assert told.revoked == ("abc",)


@pytest.mark.parametrize("state", State)
def test_a_process_server_lets_go_at_once_where_the_points_are_to_go(state: State) -> None:
    told = for_process_server(NODE, [machine(state, points=REMOVING)], [])
    assert (told.machines, told.ended) == ((), (ID,))


def test_a_process_server_lets_go_of_machines_that_another_one_takes() -> None:
    moved = machine(State.PROTECTED)
    moved.process_server_id = uuid.uuid4()
    told = for_process_server(NODE, [moved], [])
    assert (told.machines, told.ended) == ((), (moved.id,))


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("points", [KEPT, REMOVING, NO_POINTS])
def test_points_go_only_when_that_was_asked_for(state: State, points: str) -> None:
    told = for_applier(NODE, [Protected(machine(state, points=points), policy())])
    assert (told.removed == (ID,)) == (points == REMOVING)
    assert not set(told.removed) & {each.id for each in told.machines}
    if points == KEPT:
        assert [each.id for each in told.machines] == [ID]
        live = state != State.UNPROTECTED
        thinned = live and state not in RECOVERING
        assert (told.machines[0].apply, told.machines[0].keep) == (live, thinned)
        assert told.machines[0].retention_seconds == 7200


def test_points_without_a_policy_stay_as_they_are() -> None:
    told = for_applier(NODE, [Protected(machine(State.UNPROTECTED), None)])
    assert (told.machines[0].apply, told.machines[0].keep) == (False, False)

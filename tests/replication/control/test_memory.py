"""What may be followed of an assignment, whatever was heard before."""

import uuid
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.control.assignment import (
    AppliedMachine,
    ApplierAssignment,
    AssignedDisk,
    ComputeAssignment,
    MachineAssignment,
    ProcessServerAssignment,
)
from replication.control.memory import (
    CONFIRMED_STEP,
    RESTORED_STEP,
    Followed,
    judge,
    without_losses,
)
from replication.control.recovery import HOLDS_MAX, Hold, VirtualMachineOrder, VmPower

IDS = [uuid.UUID(int=number) for number in range(1, 5)]
VERSIONS = st.integers(0, 1 << 40)
SERIALS = st.lists(st.sampled_from("abcdef"), unique=True).map(tuple)
SOME = st.lists(st.sampled_from(IDS), unique=True).map(tuple)
DISKS = (AssignedDisk(index=0, device="wwn-0", name="sda", size_bytes=1),)

machines = st.builds(
    MachineAssignment,
    version=VERSIONS,
    machine=st.just(IDS[0]),
    name=st.just("web"),
    protected=st.booleans(),
    replicate=st.booleans(),
    disks=st.sampled_from([(), DISKS]),
    final=st.integers(0, 2),
)
process_servers = st.builds(
    ProcessServerAssignment, version=VERSIONS, machines=SOME, ended=SOME, revoked=SERIALS
)
applied = st.builds(
    AppliedMachine,
    id=st.sampled_from(IDS),
    name=st.just("web"),
    keep=st.booleans(),
    retention_seconds=st.integers(0, 10**6),
    crash_frequency_seconds=st.integers(0, 10**4),
)
holds = st.builds(
    Hold,
    id=st.sampled_from(IDS),
    machine=st.sampled_from(IDS),
    choice=st.sampled_from(["latest", "latest-processed"]),
    until_ns=st.integers(0, 9),
)
appliers = st.builds(
    ApplierAssignment,
    version=VERSIONS,
    machines=st.lists(applied, unique_by=lambda one: one.id).map(tuple),
    removed=SOME,
    holds=st.lists(holds, unique_by=lambda one: one.id).map(tuple),
)


@dataclass
class Server:
    """A config server's counter for one node, which is counted up and put back."""

    version: int = 1
    backup: int = 1


STEPS = st.lists(st.sampled_from(["count", "back up", "put back", "restored", "ask"]), max_size=60)


def test_what_only_grows_is_followed_wholly() -> None:
    followed = Followed()
    for version in (1, 1, 2, 40, 41, RESTORED_STEP, 3 * RESTORED_STEP):
        judged = judge(followed, version)
        assert judged.wholly
        followed = judged.followed
        assert followed == Followed(highest=version)


@given(STEPS)
def test_an_older_memory_that_was_heard_is_not_followed_wholly_before_it_is_confirmed(
    steps: list[str],
) -> None:
    server, followed, highest, is_older = Server(), Followed(), 0, False
    for step in steps:
        match step:
            case "count":
                server.version += 1
            case "back up":
                server.backup = server.version
            case "put back":
                server.version = server.backup
            case "restored":
                server.version += RESTORED_STEP
                is_older = is_older and server.version < highest + CONFIRMED_STEP
            case "ask":
                is_older = is_older or server.version < highest
                judged = judge(followed, server.version)
                assert judged.wholly is not is_older
                assert judged.followed.is_older is is_older
                followed = judged.followed
                highest = highest if is_older else server.version
                assert followed.highest == highest


@given(st.integers(0, 1 << 50), st.integers(1, CONFIRMED_STEP), st.integers(0, CONFIRMED_STEP - 1))
def test_a_confirmation_is_enough_and_counting_is_not(
    highest: int, lost: int, counted: int
) -> None:
    lower = max(0, highest - lost)
    followed = judge(Followed(highest=highest), lower).followed
    assert followed.is_older is (lower < highest)
    if followed.is_older:
        assert not judge(followed, lower + counted).wholly
        assert not judge(followed, highest + CONFIRMED_STEP - 1).wholly
    assert judge(followed, lower + RESTORED_STEP).wholly


@given(machines, st.none() | machines)
def test_an_agent_never_begins_to_forget(
    newer: MachineAssignment, before: MachineAssignment | None
) -> None:
    kept = without_losses(newer, before)
    assert kept.version == newer.version
    if before is None or before.protected:
        assert kept.protected
    assert kept.final == 0
    if newer.protected:
        assert kept == newer.model_copy(update={"final": 0})
    elif before is not None and before.protected:
        assert kept == before.model_copy(update={"version": newer.version, "final": 0})
    else:
        assert not kept.replicate or before is not None
    assert without_losses(newer, kept) == kept


@given(process_servers, st.none() | process_servers)
def test_a_process_server_lets_go_of_nothing_and_trusts_nobody_anew(
    newer: ProcessServerAssignment, before: ProcessServerAssignment | None
) -> None:
    kept = without_losses(newer, before)
    assert (kept.version, kept.machines, kept.ended) == (newer.version, newer.machines, ())
    assert set(kept.revoked) == {*newer.revoked, *(before.revoked if before else ())}


@given(appliers, st.none() | appliers)
def test_an_applier_removes_nothing_and_thins_no_sooner(
    newer: ApplierAssignment, before: ApplierAssignment | None
) -> None:
    kept = without_losses(newer, before)
    assert (kept.version, kept.removed) == (newer.version, ())
    assert [one.id for one in kept.machines] == [one.id for one in newer.machines]
    was = {one.id: one for one in before.machines} if before else {}
    for one, said in zip(kept.machines, newer.machines, strict=True):
        for policy in (said, was.get(one.id, said)):
            assert one.retention_seconds >= policy.retention_seconds
            assert one.crash_frequency_seconds <= policy.crash_frequency_seconds
        assert (one.keep, one.apply) == (said.keep, said.apply)
    named = {one.id: one for one in newer.holds}
    held = {one.id: one for one in before.holds} if before else {}
    assert [one.id for one in kept.holds[: len(named)]] == [one.id for one in newer.holds]
    assert {one.id for one in kept.holds} == {*named, *held}
    for hold in kept.holds:
        said_hold = named.get(hold.id, held.get(hold.id))
        assert said_hold is not None
        until_ns = max(said_hold.until_ns, held.get(hold.id, said_hold).until_ns)
        assert hold == said_hold.model_copy(update={"until_ns": until_ns})


def test_what_an_assignment_cannot_hold_of_an_older_memory_is_what_it_does_not_name() -> None:
    def many(count: int) -> tuple[Hold, ...]:
        return tuple(Hold(id=uuid.uuid4(), machine=IDS[0], choice="latest") for _ in range(count))

    newer = ApplierAssignment(version=1, holds=many(1000))
    kept = without_losses(newer, ApplierAssignment(version=2, holds=many(1000)))
    assert len(kept.holds) == HOLDS_MAX
    assert set(newer.holds) <= set(kept.holds)


@pytest.mark.parametrize("kept", ["", "{", '{"highest": -1}', '{"highest": "x"}'])
def test_what_is_damaged_is_refused(kept: str) -> None:
    with pytest.raises(ValueError, match="Followed"):
        Followed.model_validate_json(kept)


def vm(number: int, power: VmPower) -> VirtualMachineOrder:
    return VirtualMachineOrder(
        id=IDS[number], name="web", machine=IDS[number], disks=(), network="test", power=power
    )


def test_a_compute_node_removes_nothing_and_switches_nothing_off() -> None:
    before = ComputeAssignment(version=9, vms=(vm(0, VmPower.ON), vm(1, VmPower.OFF)))
    newer = ComputeAssignment(
        version=3,
        vms=(vm(0, VmPower.OFF), vm(1, VmPower.DISKS), vm(2, VmPower.ON)),
        removed=(IDS[3],),
    )
    followed = without_losses(newer, before)
    assert followed.removed == ()
    assert [order.power for order in followed.vms] == [VmPower.ON, VmPower.DISKS, VmPower.ON]
    assert without_losses(newer, None) == newer.model_copy(update={"removed": ()})

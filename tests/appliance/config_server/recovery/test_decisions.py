"""What follows from what applier and compute node answer."""

import uuid
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.recovery.decisions import (
    Bad,
    CopyView,
    Good,
    HoldView,
    Instead,
    Stamp,
    Wait,
    hold_is_needed,
    judge_copy,
    judge_disks,
    judge_hold,
    judge_off,
    judge_store,
    judge_vm,
    rpo_seconds,
    rto_seconds,
    settled_state,
    source_disks,
)
from appliance.config_server.recovery.run import FailoverState
from replication.control.recovery import (
    HeldPoint,
    PointChoice,
    PointDisk,
    VmCheck,
    VmReport,
    VmState,
)
from replication.control.report import StoreReport

MACHINE = uuid.UUID(int=1)
SECOND = 10**9
ANSWER = 30 * SECOND
HELD = HeldPoint(
    id=uuid.UUID(int=2),
    machine=MACHINE,
    state="held",
    folder="web-1",
    point="p7",
    generation=1,
    number=7,
    disks=(PointDisk(index=0, name="sda", size_bytes=512),),
)


def view(
    choice: str = PointChoice.LATEST, *, waited: float = 1, final: Stamp | None = None
) -> HoldView:
    return HoldView(MACHINE, "web-1", choice, int(waited * SECOND), 120, ANSWER, final)


def waiting(reason: str = "") -> HeldPoint:
    return HeldPoint(id=HELD.id, machine=MACHINE, state="waiting", reason=reason)


def test_a_held_point_is_taken() -> None:
    assert judge_hold(view(), HELD) == Good()
    assert [disk.source for disk in source_disks(HELD)] == ["web-1/p7/disk0.img"]


@pytest.mark.parametrize(
    "told",
    [
        {"point": "p" * 256},
        {"consistency": "c" * 65},
        {"folder": "f" * 1900},
        {"consistency": "crash\n"},
    ],
)
def test_what_cannot_be_stored_is_no_point(told: dict[str, str]) -> None:
    found = judge_hold(view(), HELD.model_copy(update=told))
    assert isinstance(found, Bad)
    assert found.code == "point_wrong"


def test_the_latest_is_waited_for_then_what_is_processed_is_taken() -> None:
    assert judge_hold(view(waited=119), waiting("1.9 is missing")) == Wait(
        "waits for the applier: 1.9 is missing; after 120 s what is processed is taken"
    )
    assert judge_hold(view(waited=121), waiting()) == Instead(PointChoice.LATEST_PROCESSED)
    at_once = replace(view(waited=1), wait_seconds=0)
    assert judge_hold(at_once, waiting()) == Instead(PointChoice.LATEST_PROCESSED)
    assert isinstance(judge_hold(at_once, None), Wait)


def test_the_last_changeset_is_replaced_by_no_other_point() -> None:
    final = Stamp(1, 7)
    assert isinstance(judge_hold(view(waited=121, final=final), waiting()), Wait)
    late = judge_hold(view(waited=151, final=final), waiting())
    assert isinstance(late, Bad)
    assert late.code == "no_answer"
    assert judge_hold(view(final=final), HELD) == Good()
    other = judge_hold(view(final=Stamp(1, 6)), HELD)
    assert isinstance(other, Bad)
    assert other.code == "not_the_last"


@pytest.mark.parametrize("choice", ["p7", PointChoice.LATEST_PROCESSED])
def test_an_applier_that_does_not_answer_is_waited_for_so_long_and_no_longer(choice: str) -> None:
    assert judge_hold(view(choice, waited=29), None) == Wait("waits for the applier, 30 s at most")
    late = judge_hold(view(choice, waited=31), None)
    assert isinstance(late, Bad)
    assert late.code == "no_answer"


def test_a_silent_applier_is_given_no_other_order_to_leave_undone() -> None:
    assert isinstance(judge_hold(view(waited=121), None), Wait)
    assert isinstance(judge_hold(view(waited=151), None), Bad)


def test_what_is_refused_says_why() -> None:
    refused = HELD.model_copy(update={"state": "refused", "reason": "no such point"})
    found = judge_hold(view("p8"), refused)
    assert isinstance(found, Bad)
    assert (found.code, "no such point" in found.message) == ("point_refused", True)
    assert "`understudy points web-1`" in found.hint


@pytest.mark.parametrize(
    "change",
    [
        {"machine": uuid.UUID(int=9)},
        {"disks": ()},
        {"folder": "../etc"},
        {"folder": "/etc"},
        {"folder": ""},
        {"point": ".."},
        {"point": "a//b"},
    ],
)
def test_a_point_of_another_machine_or_place_is_no_point(change: dict[str, object]) -> None:
    found = judge_hold(view(), HELD.model_copy(update=change))
    assert isinstance(found, Bad)
    assert found.code == "point_wrong"


def vm(state: VmState, **changes: object) -> VmReport:
    return VmReport.model_validate({"id": MACHINE, "state": state, **changes})


def test_what_is_wrong_at_the_second_site_is_mended_before_a_planned_failover() -> None:
    store, last = StoreReport(machine=MACHINE, generation=1, applied=6), Stamp(1, 7)
    assert judge_store(None, ANSWER + 1, ANSWER) == judge_store(store, ANSWER + 1, ANSWER) == Good()
    for wrong in ({"open_repairs": 1}, {"lost": "rot"}):
        told = store.model_copy(update=wrong)
        assert isinstance(judge_store(told, ANSWER, ANSWER), Wait)
        assert isinstance(judge_store(told, ANSWER, ANSWER, last), Wait)  # which may mend it
        applied = told.model_copy(update={"applied": 7})
        for found in (judge_store(told, ANSWER + 1, ANSWER), judge_store(applied, 0, ANSWER, last)):
            assert isinstance(found, Bad)
            assert found.code == "not_whole"


def test_disks_are_made_or_not() -> None:
    assert isinstance(judge_disks(None, 0, ANSWER), Wait)
    assert isinstance(judge_disks(vm(VmState.PREPARING), 0, ANSWER), Wait)
    assert judge_disks(vm(VmState.DISKS_READY), 0, ANSWER) == Good()
    for found in (
        judge_disks(None, ANSWER + 1, ANSWER),
        judge_disks(vm(VmState.FAILED, reason="no room"), 0, ANSWER),
    ):
        assert isinstance(found, Bad)
        assert found.hint


@pytest.mark.parametrize("state", VmState)
@pytest.mark.parametrize("waited", [0, 1000])
def test_a_vm_is_up_when_it_is_up_and_its_check_has_passed(state: VmState, waited: int) -> None:
    found = judge_vm(vm(state), waited * SECOND, check_seconds_max=300, answer_ns=ANSWER)
    if state is VmState.UP:
        assert found == Good()
    elif state in (VmState.FAILED, VmState.STOPPED) or waited:
        assert isinstance(found, Bad)
    else:
        assert isinstance(found, Wait)


@pytest.mark.parametrize("state", [VmState.UP, VmState.FAILED])
def test_a_check_that_failed_is_told_as_that(state: VmState) -> None:
    failed = VmCheck(passed=False, detail="/dev/vda1 is not clean")
    found = judge_vm(vm(state, check=failed), 0, check_seconds_max=1, answer_ns=ANSWER)
    assert isinstance(found, Bad)
    assert found.code == "check_failed"
    assert "not clean" in found.message


def test_a_node_that_says_nothing_is_waited_for_and_then_told() -> None:
    assert isinstance(judge_vm(None, 0, check_seconds_max=1, answer_ns=ANSWER), Wait)
    assert isinstance(judge_vm(None, ANSWER + 1, check_seconds_max=1, answer_ns=ANSWER), Bad)


@pytest.mark.parametrize("state", VmState)
def test_off_is_what_does_not_run(state: VmState) -> None:
    is_off = state in (VmState.STOPPED, VmState.DISKS_READY)
    assert isinstance(judge_off(vm(state)), Good if is_off else Wait)
    assert isinstance(judge_off(None), Good)


@given(
    st.lists(st.tuples(st.booleans(), st.booleans())),
    st.sampled_from(FailoverState),
    st.booleans(),
)
def test_a_hold_ends_only_when_no_vm_reads_from_it(
    vms: list[tuple[bool, bool]], state: FailoverState, has_job: bool
) -> None:
    needed = hold_is_needed(vms, state, has_job=has_job)
    if any(not is_gone and not is_independent for is_gone, is_independent in vms):
        assert needed
    elif vms or not has_job:
        assert not needed


@pytest.mark.parametrize("state", FailoverState)
def test_what_is_to_go_has_gone_when_the_last_vm_has(state: FailoverState) -> None:
    ends = {
        FailoverState.CLEANING: FailoverState.CLEANED,
        FailoverState.CANCELLING: FailoverState.CANCELLED,
    }
    assert settled_state(state, [True, True]) is ends.get(state)
    assert settled_state(state, []) is ends.get(state)
    assert settled_state(state, [True, False]) is None


def test_both_objectives_are_told_in_seconds_where_they_are_known() -> None:
    assert rto_seconds(2 * SECOND, 5 * SECOND) == 3
    assert rto_seconds(2 * SECOND, 0) is None
    assert rpo_seconds(9 * SECOND, 4 * SECOND) == 5
    assert rpo_seconds(9 * SECOND, 0) is None
    assert rpo_seconds(4 * SECOND, 9 * SECOND) == 0


def copy(*, silent: float = 0, still: float = 0) -> CopyView:
    return CopyView(int(silent * SECOND), int(still * SECOND), ANSWER)


def test_a_copy_of_disks_may_take_long_while_it_moves_and_its_node_is_heard() -> None:
    half = vm(VmState.UP, independent_share=0.5, reason="it has snapshots")
    assert judge_copy(copy(), half) == Wait(
        "50% of the disks stand alone: it has snapshots; as long as it moves within 3600 s"
    )
    assert isinstance(judge_copy(copy(silent=30, still=3600), half), Wait)
    stood_still = judge_copy(copy(still=3601), half)
    assert isinstance(stood_still, Bad)
    assert (stood_still.code, "it has snapshots" in stood_still.message) == ("no_progress", True)
    for report in (half, None):
        silent = judge_copy(copy(silent=31), report)
        assert isinstance(silent, Bad)
        assert silent.code == "no_answer"
    done = vm(VmState.UP, independent=True)
    assert judge_copy(copy(silent=31, still=3601), done) == Good()

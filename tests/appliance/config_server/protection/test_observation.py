"""Reports in, events of the table out."""

import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.protection.observation import (
    DiskView,
    MachineView,
    Observation,
    apply_report,
)
from appliance.config_server.protection.table import Event, State, allows, step
from replication.control.report import BlockDevice, MachineReport, Phase, ResyncCause, StoreReport

GIB = 1 << 30
SINCE = 1_000_000
DISK = DiskView(0, "wwn-1", "sda", GIB)


def view(state: State, **more: Any) -> MachineView:
    return MachineView(state, SINCE, **{"disks": (DISK,), **more})


def agent(phase: Phase, **more: Any) -> MachineReport:
    size = more.pop("size", GIB)
    device = BlockDevice(id="wwn-1", device="/dev/sda", size_bytes=size)
    return MachineReport(
        time_ns=SINCE, phase=phase, devices=(device,), **{"generation": 1, "committed": 9, **more}
    )


def store(**more: Any) -> StoreReport:
    return StoreReport(
        machine=uuid.UUID(int=1),
        **{"generation": 1, "applied": 9, "newest_ns": SINCE + 5, **more},
    )


def event(observed: Observation) -> Event | None:
    return observed.happenings[0].event if observed.happenings else None


@pytest.mark.parametrize("state", [State.UNPROTECTED, State.ENABLING, State.DISABLING])
@pytest.mark.parametrize("phase", list(Phase))
def test_reports_change_nothing_while_a_job_is_at_work(state: State, phase: Phase) -> None:
    assert apply_report(view(state), agent(phase, size=1), store(lost="x")) == Observation()


def test_nothing_follows_without_a_report() -> None:
    assert apply_report(view(State.PROTECTED), None, store()) == Observation()


def test_first_point_ends_the_initial_replication() -> None:
    replicating, state = agent(Phase.REPLICATING), view(State.INITIAL_REPLICATION)
    assert event(apply_report(state, replicating, store())) is Event.FIRST_POINT
    assert event(apply_report(state, agent(Phase.INITIAL), store())) is None
    assert event(apply_report(state, replicating, None)) is None
    assert event(apply_report(state, replicating, store(newest_ns=0))) is None
    assert event(apply_report(state, replicating, store(generation=0))) is None


def test_a_point_of_before_is_not_the_first_unless_all_is_applied() -> None:
    state, replicating = view(State.INITIAL_REPLICATION), agent(Phase.REPLICATING)
    assert event(apply_report(state, replicating, store(newest_ns=5, applied=8))) is None
    assert event(apply_report(state, replicating, store(newest_ns=5))) is Event.FIRST_POINT


def test_the_sources_clock_is_corrected() -> None:
    state, replicating = view(State.INITIAL_REPLICATION), agent(Phase.REPLICATING)
    late = store(newest_ns=SINCE + 50, applied=8)
    assert event(apply_report(state, replicating, late, skew_ns=51)) is None
    assert event(apply_report(state, replicating, late, skew_ns=50)) is Event.FIRST_POINT


@pytest.mark.parametrize(
    "state", [State.INITIAL_REPLICATION, State.PROTECTED, State.RESYNCHRONISING]
)
@pytest.mark.parametrize("cause", list(ResyncCause))
def test_the_agents_cause_is_kept(state: State, cause: ResyncCause) -> None:
    observed = apply_report(
        view(state), agent(Phase.RESYNC_REQUIRED, cause=cause, reason="why"), store()
    )
    happening = observed.happenings[0]
    assert (happening.event, happening.cause, happening.reason, happening.order) == (
        Event.RESYNC_REQUIRED,
        cause,
        "why",
        False,
    )


def test_the_same_cause_is_no_news_and_another_is() -> None:
    state = view(State.RESYNC_REQUIRED, cause="unclean-shutdown")
    same = agent(Phase.RESYNC_REQUIRED, cause=ResyncCause.UNCLEAN_SHUTDOWN)
    other = agent(Phase.RESYNC_REQUIRED, cause=ResyncCause.TRACKING_LOST)
    assert event(apply_report(state, same, store())) is None
    assert event(apply_report(state, other, store())) is Event.RESYNC_REQUIRED


def test_a_resync_begins_and_ends_by_reports() -> None:
    begun = agent(Phase.RESYNCHRONISING, generation=2)
    for state in (State.PROTECTED, State.RESYNC_REQUIRED, State.INITIAL_REPLICATION):
        assert event(apply_report(view(state), begun, store())) is Event.RESYNC_BEGUN
    under_way = view(State.RESYNCHRONISING)
    assert event(apply_report(under_way, begun, store())) is None
    done = agent(Phase.REPLICATING, generation=2)
    assert event(apply_report(under_way, done, store())) is None
    assert event(apply_report(under_way, done, store(generation=2))) is Event.RESYNC_DONE


def test_a_resync_that_nobody_saw_begin_has_ended_when_its_order_was_carried_out() -> None:
    asked = view(State.RESYNC_REQUIRED, resync_request=3)
    before = agent(Phase.REPLICATING, resync_request=2)
    after = agent(Phase.REPLICATING, resync_request=3, generation=2)
    assert event(apply_report(asked, before, store())) is None
    assert event(apply_report(asked, after, store(generation=2))) is Event.RESYNC_DONE
    waiting = view(State.RESYNC_REQUIRED, resync_in_window=True)
    assert event(apply_report(waiting, before, store())) is None


def test_a_disk_of_another_size_needs_a_resync_that_is_ordered() -> None:
    observed = apply_report(view(State.PROTECTED), agent(Phase.REPLICATING, size=2 * GIB), store())
    happening = observed.happenings[0]
    assert happening.cause is ResyncCause.DISK_RESIZED
    assert happening.order
    assert str(2 * GIB) in happening.reason
    assert observed.sizes == ((0, 2 * GIB),)


def test_a_resize_that_the_agent_knows_of_is_not_ordered_again() -> None:
    known = agent(Phase.RESYNC_REQUIRED, cause=ResyncCause.DISK_RESIZED, size=2 * GIB)
    observed = apply_report(view(State.PROTECTED), known, store())
    assert not observed.happenings[0].order
    assert observed.sizes == ((0, 2 * GIB),)


def test_a_store_that_lost_something_needs_a_resync_that_is_ordered() -> None:
    replicating = agent(Phase.REPLICATING)
    observed = apply_report(view(State.PROTECTED), replicating, store(lost="a blob is gone"))
    happening = observed.happenings[0]
    assert (happening.cause, happening.order) == (ResyncCause.INTEGRITY, True)
    required = view(State.RESYNC_REQUIRED, cause="integrity", resync_in_window=True)
    assert event(apply_report(required, replicating, store(lost="a blob is gone"))) is None
    begun = agent(Phase.RESYNCHRONISING, generation=2)
    under_way = view(State.RESYNCHRONISING)
    assert event(apply_report(under_way, begun, store(lost="a blob is gone"))) is None


@given(
    state=st.sampled_from(State),
    phase=st.sampled_from(Phase),
    cause=st.sampled_from([None, *ResyncCause]),
    size=st.sampled_from([0, 1, GIB]),
    generations=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    lost=st.sampled_from(["", "gone"]),
    newest=st.sampled_from([0, SINCE - 1, SINCE]),
    requests=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    waiting=st.booleans(),
)
def test_whatever_is_reported_fits_the_table_and_settles(
    *,
    state: State,
    phase: Phase,
    cause: ResyncCause | None,
    size: int,
    generations: tuple[int, int],
    lost: str,
    newest: int,
    requests: tuple[int, int],
    waiting: bool,
) -> None:
    """The same reports over and over bring a machine to rest, through events of the table."""
    told = agent(
        phase, cause=cause, size=size, generation=generations[0], resync_request=requests[0]
    )
    kept = store(generation=generations[1], lost=lost, newest_ns=newest)
    now = view(state, resync_request=requests[1], resync_in_window=waiting)
    for _ in range(6):
        observed = apply_report(now, told, kept)
        sizes = dict(observed.sizes)
        disk = DiskView(0, "wwn-1", "sda", sizes.get(0, now.disks[0].size_bytes))
        if not observed.happenings:
            return
        happening = observed.happenings[0]
        assert allows(now.state, happening.event)
        entered = step(now.state, happening.event)[0]
        now = MachineView(
            entered,
            SINCE,
            cause=happening.cause or "",
            resync_request=requests[1],
            resync_in_window=happening.order
            or (now.resync_in_window and happening.event is not Event.RESYNC_BEGUN),
            disks=(disk,),
        )
    pytest.fail(f"no rest: {now}")

"""Every pair of state and event: allowed as told here, or a conflict that names the state."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.protection.table import (
    RECOVERING,
    REPLICATING,
    TABLE,
    Command,
    Event,
    IllegalTransitionError,
    State,
    allows,
    step,
)

EXPECTED = """
unprotected          enabling    : protect-asked
unprotected          disabling   : points-removal-asked
unprotected          unprotected : agent-lost agent-found
enabling             initial-replication : enabled
enabling             unprotected : enable-failed
enabling             enabling    : agent-lost agent-found
initial-replication  protected   : first-point
initial-replication  resync-required : resync-required
initial-replication  resynchronising : resync-begun
initial-replication  disabling   : unprotect-asked
initial-replication  initial-replication : disk-added disk-excluded agent-lost agent-found
protected            resync-required : resync-asked resync-required
protected            resynchronising : resync-begun
protected            disabling   : unprotect-asked
protected            protected   : disk-added disk-excluded agent-lost agent-found
resync-required      resync-required : resync-asked resync-required disk-added disk-excluded
resync-required      resync-required : agent-lost agent-found
resync-required      resynchronising : resync-begun
resync-required      protected   : resync-done
resync-required      disabling   : unprotect-asked
resynchronising      resync-required : resync-required
resynchronising      protected   : resync-done
resynchronising      disabling   : unprotect-asked
resynchronising      resynchronising : agent-lost agent-found
disabling            unprotected : disabled
disabling            disabling   : unprotect-asked disable-failed agent-lost agent-found
protected            failing-over : failover-asked
resync-required      failing-over : failover-asked
resynchronising      failing-over : failover-asked
failing-over         failed-over : failover-done
failing-over         protected   : failover-failed
failing-over         failing-over : agent-lost agent-found
failed-over          failed-over : change-point-asked commit-asked agent-lost agent-found
failed-over          committed   : committed
failed-over          cancelling  : cancel-asked
failed-over          disabling   : unprotect-asked
cancelling           protected   : cancelled
cancelling           cancelling  : cancel-asked cancel-failed agent-lost agent-found
cancelling           disabling   : unprotect-asked
committed            disabling   : unprotect-asked
committed            committed   : agent-lost agent-found
"""

ALLOWED = {
    (State(words[0]), Event(event)): State(words[1])
    for words, events in (
        (line.split(":")[0].split(), line.split(":")[1].split())
        for line in EXPECTED.strip().splitlines()
    )
    for event in events
}


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_pair_is_as_expected_or_a_conflict_that_names_the_state(
    state: State, event: Event
) -> None:
    if (state, event) in ALLOWED:
        assert allows(state, event)
        assert step(state, event)[0] is ALLOWED[state, event]
        return
    assert not allows(state, event)
    with pytest.raises(IllegalTransitionError, match="web-1") as conflict:
        step(state, event, machine="web-1")
    assert str(conflict.value.args[0]).endswith(f" it is {state}")
    assert conflict.value.code == "conflict"
    assert conflict.value.hint


def test_what_people_ask_for_is_done_by_a_job_and_nothing_else_is() -> None:
    for state, row in TABLE.items():
        for event, (_, commands) in row.items():
            asked = event.endswith("-asked") or event in (Event.DISK_ADDED, Event.DISK_EXCLUDED)
            assert (Command.START_JOB in commands) == asked, (state, event)


def test_nodes_are_told_when_replication_ends_without_their_doing() -> None:
    for state, row in TABLE.items():
        for event, (target, commands) in row.items():
            if state in REPLICATING and target is State.UNPROTECTED:
                assert set(commands) >= set(Command) - {Command.START_JOB}, (state, event)


def test_nodes_are_told_of_each_way_into_and_out_of_a_failover() -> None:
    for state, row in TABLE.items():
        for event, (target, commands) in row.items():
            if state in RECOVERING and target is not state and Command.START_JOB not in commands:
                assert set(commands) >= set(Command) - {Command.START_JOB}, (state, event)


def test_every_state_is_reached_and_can_be_left_towards_unprotected() -> None:
    edges = {(state, target) for state, row in TABLE.items() for target, _ in row.values()}
    for start in State:
        seen, todo = {start}, [start]
        while todo:
            state = todo.pop()
            todo += [target for source, target in edges if source is state and target not in seen]
            seen |= {target for source, target in edges if source is state}
        assert State.UNPROTECTED in seen
        if start is State.UNPROTECTED:
            assert seen == set(State)


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_walks_keep_to_the_order_of_a_protection(events: list[Event]) -> None:
    """Nothing is protected that was not enabled and given a point; conflicts change nothing."""
    state, enabled, pointed = State.UNPROTECTED, False, False
    for event in events:
        try:
            state, _ = step(state, event)
        except IllegalTransitionError:
            continue
        if event is Event.ENABLED:
            enabled, pointed = True, False
        pointed |= event in (Event.FIRST_POINT, Event.RESYNC_DONE)
        if state is State.PROTECTED:
            assert enabled
            assert pointed
        if state is State.UNPROTECTED:
            enabled = False

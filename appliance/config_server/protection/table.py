"""A machine's protection as a table: state x event -> state and commands.

A pair that is not in the table is a conflict that names the state and says why. The new state is
written before a command runs; commands can be repeated. A test failover is no event: it changes
nothing of its machine.

Source: docs/CONTROL.md §9; docs/RECOVERY.md §4.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from replication.errors import ConflictError


class IllegalTransitionError(ConflictError):
    """What was asked for cannot happen to a machine in this state; nothing was changed."""


class State(StrEnum):
    """Where a machine's protection is.

    UNPROTECTED:         nothing is replicated; points may be kept from before.
    ENABLING:            a job makes its key and tells the nodes.
    INITIAL_REPLICATION: everything is being sent; there is no point to restore yet.
    PROTECTED:           points are made.
    RESYNC_REQUIRED:     changes no longer join on; old points stay, new ones are not made.
    RESYNCHRONISING:     both sides are compared, and what differs is sent.
    DISABLING:           a job ends the replication.
    FAILING_OVER:        a job recovers it at the second site; replication goes on until it has.
    FAILED_OVER:         its VM runs there; the agent tracks and sends nothing. It can be taken
                         back, have another point, or be committed.
    CANCELLING:          a job takes the failover back.
    COMMITTED:           the VM stands alone; there is no way back without reprotection.
    """

    UNPROTECTED = "unprotected"
    ENABLING = "enabling"
    INITIAL_REPLICATION = "initial-replication"
    PROTECTED = "protected"
    RESYNC_REQUIRED = "resync-required"
    RESYNCHRONISING = "resynchronising"
    DISABLING = "disabling"
    FAILING_OVER = "failing-over"
    FAILED_OVER = "failed-over"
    CANCELLING = "cancelling"
    COMMITTED = "committed"


class Event(StrEnum):
    """What happens to a machine: people ask (`…-asked`), jobs end, nodes report."""

    PROTECT_ASKED = "protect-asked"
    ENABLED = "enabled"
    ENABLE_FAILED = "enable-failed"
    FIRST_POINT = "first-point"
    RESYNC_ASKED = "resync-asked"
    RESYNC_REQUIRED = "resync-required"
    RESYNC_BEGUN = "resync-begun"
    RESYNC_DONE = "resync-done"
    DISK_ADDED = "disk-added"
    DISK_EXCLUDED = "disk-excluded"
    UNPROTECT_ASKED = "unprotect-asked"
    DISABLED = "disabled"
    DISABLE_FAILED = "disable-failed"
    POINTS_REMOVAL_ASKED = "points-removal-asked"
    FAILOVER_ASKED = "failover-asked"
    FAILOVER_DONE = "failover-done"
    FAILOVER_FAILED = "failover-failed"
    CHANGE_POINT_ASKED = "change-point-asked"
    COMMIT_ASKED = "commit-asked"
    COMMITTED = "committed"
    CANCEL_ASKED = "cancel-asked"
    CANCELLED = "cancelled"
    CANCEL_FAILED = "cancel-failed"
    AGENT_LOST = "agent-lost"
    AGENT_FOUND = "agent-found"


class Command(StrEnum):
    """What follows a change. START_JOB: by the job that was written with the new state; the others
    count up the version of a node's assignment, in the transaction that writes the state.
    """

    START_JOB = "start-job"
    TELL_AGENT = "tell-agent"
    TELL_PROCESS_SERVER = "tell-process-server"
    TELL_APPLIER = "tell-applier"


Outcome = tuple[State, tuple[Command, ...]]

REPLICATING = frozenset(
    {
        State.ENABLING,
        State.INITIAL_REPLICATION,
        State.PROTECTED,
        State.RESYNC_REQUIRED,
        State.RESYNCHRONISING,
    }
)
"""States of a machine that is replicated."""

RECOVERING = frozenset({State.FAILING_OVER, State.FAILED_OVER, State.CANCELLING, State.COMMITTED})
"""States of a failover: its agent tracks, and none of its points is thinned."""

SENDING = REPLICATING | {State.FAILING_OVER}
"""States in which the agent is told to replicate: a failover that fails has then cost nothing."""

TESTABLE = frozenset(
    {State.PROTECTED, *(State.RESYNC_REQUIRED, State.RESYNCHRONISING), State.FAILED_OVER}
)
"""States in which there are points for a test failover."""

RESYNCING = frozenset({State.RESYNC_REQUIRED, State.RESYNCHRONISING})
"""States that have a cause."""

_JOB = (Command.START_JOB,)
_ALL = (Command.TELL_AGENT, Command.TELL_PROCESS_SERVER, Command.TELL_APPLIER)


def _stay(state: State, *events: Event) -> dict[Event, Outcome]:
    return dict.fromkeys(events, (state, ()))


_LOSS = (Event.AGENT_LOST, Event.AGENT_FOUND)
"""An agent that is not heard of changes no state: it carries on by itself, and health says so."""

_DISKS: dict[State, dict[Event, Outcome]] = {
    state: {Event.DISK_ADDED: (state, _JOB), Event.DISK_EXCLUDED: (state, _JOB)}
    for state in (State.INITIAL_REPLICATION, State.PROTECTED, State.RESYNC_REQUIRED)
}

TABLE: Mapping[State, Mapping[Event, Outcome]] = MappingProxyType(
    {
        State.UNPROTECTED: {
            Event.PROTECT_ASKED: (State.ENABLING, _JOB),
            Event.POINTS_REMOVAL_ASKED: (State.DISABLING, _JOB),
            **_stay(State.UNPROTECTED, *_LOSS),
        },
        State.ENABLING: {
            Event.ENABLED: (State.INITIAL_REPLICATION, ()),
            Event.ENABLE_FAILED: (State.UNPROTECTED, _ALL),
            **_stay(State.ENABLING, *_LOSS),
        },
        State.INITIAL_REPLICATION: {
            Event.FIRST_POINT: (State.PROTECTED, ()),
            Event.RESYNC_REQUIRED: (State.RESYNC_REQUIRED, ()),
            Event.RESYNC_BEGUN: (State.RESYNCHRONISING, ()),
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            **_DISKS[State.INITIAL_REPLICATION],
            **_stay(State.INITIAL_REPLICATION, *_LOSS),
        },
        State.PROTECTED: {
            Event.RESYNC_ASKED: (State.RESYNC_REQUIRED, _JOB),
            Event.RESYNC_REQUIRED: (State.RESYNC_REQUIRED, ()),
            Event.RESYNC_BEGUN: (State.RESYNCHRONISING, ()),
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            Event.FAILOVER_ASKED: (State.FAILING_OVER, _JOB),
            **_DISKS[State.PROTECTED],
            **_stay(State.PROTECTED, *_LOSS),
        },
        State.RESYNC_REQUIRED: {
            Event.RESYNC_ASKED: (State.RESYNC_REQUIRED, _JOB),
            Event.RESYNC_REQUIRED: (State.RESYNC_REQUIRED, ()),
            Event.RESYNC_BEGUN: (State.RESYNCHRONISING, ()),
            Event.RESYNC_DONE: (State.PROTECTED, ()),
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            Event.FAILOVER_ASKED: (State.FAILING_OVER, _JOB),
            **_DISKS[State.RESYNC_REQUIRED],
            **_stay(State.RESYNC_REQUIRED, *_LOSS),
        },
        State.RESYNCHRONISING: {
            Event.RESYNC_REQUIRED: (State.RESYNC_REQUIRED, ()),
            Event.RESYNC_DONE: (State.PROTECTED, ()),
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            Event.FAILOVER_ASKED: (State.FAILING_OVER, _JOB),
            **_stay(State.RESYNCHRONISING, *_LOSS),
        },
        State.DISABLING: {
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            Event.DISABLED: (State.UNPROTECTED, _ALL),
            Event.DISABLE_FAILED: (State.DISABLING, ()),
            **_stay(State.DISABLING, *_LOSS),
        },
        State.FAILING_OVER: {
            Event.FAILOVER_DONE: (State.FAILED_OVER, _ALL),
            Event.FAILOVER_FAILED: (State.PROTECTED, _ALL),
            **_stay(State.FAILING_OVER, *_LOSS),
        },
        State.FAILED_OVER: {
            Event.CHANGE_POINT_ASKED: (State.FAILED_OVER, _JOB),
            Event.COMMIT_ASKED: (State.FAILED_OVER, _JOB),
            Event.COMMITTED: (State.COMMITTED, _ALL),
            Event.CANCEL_ASKED: (State.CANCELLING, _JOB),
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            **_stay(State.FAILED_OVER, *_LOSS),
        },
        State.CANCELLING: {
            Event.CANCEL_ASKED: (State.CANCELLING, _JOB),
            Event.CANCELLED: (State.PROTECTED, _ALL),
            Event.CANCEL_FAILED: (State.CANCELLING, ()),
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            **_stay(State.CANCELLING, *_LOSS),
        },
        State.COMMITTED: {
            Event.UNPROTECT_ASKED: (State.DISABLING, _JOB),
            **_stay(State.COMMITTED, *_LOSS),
        },
    }
)

_ASKED = {
    Event.PROTECT_ASKED: "protect",
    Event.RESYNC_ASKED: "resynchronise",
    Event.DISK_ADDED: "add a disk to",
    Event.DISK_EXCLUDED: "exclude a disk of",
    Event.UNPROTECT_ASKED: "unprotect",
    Event.POINTS_REMOVAL_ASKED: "remove the points of",
    Event.FAILOVER_ASKED: "fail over",
    Event.CHANGE_POINT_ASKED: "change the point of",
    Event.COMMIT_ASKED: "commit the failover of",
    Event.CANCEL_ASKED: "take back the failover of",
}
"""What people ask for, as they would say it."""

_WAY_OUT = {
    State.UNPROTECTED: "protect it first",
    State.ENABLING: "wait for the job that protects it, or cancel that job",
    State.INITIAL_REPLICATION: "wait until the first recovery point is there",
    State.PROTECTED: "it is protected already; unprotect it first to protect it anew",
    State.RESYNC_REQUIRED: "let it resynchronise first",
    State.RESYNCHRONISING: "wait until the resync under way has ended",
    State.DISABLING: "wait for the job that unprotects it; if it failed, unprotect it again",
    State.FAILING_OVER: "wait for the job that fails it over, or cancel that job",
    State.FAILED_OVER: "commit the failover or take it back first",
    State.CANCELLING: "wait for the job that takes it back; if that failed, cancel it again",
    State.COMMITTED: "unprotect it, then protect the machine that runs now",
}


def step(state: State, event: Event, *, machine: str = "the machine") -> Outcome:
    """The new state and what follows. Raises IllegalTransitionError with the state's name."""
    outcome = TABLE[state].get(event)
    if outcome is None:
        what = f"{_ASKED[event]} {machine}" if event in _ASKED else f"{event} for {machine}"
        raise IllegalTransitionError(
            f"cannot {what}: it is {state}" if event in _ASKED else f"{what}: it is {state}",
            hint=_WAY_OUT[state],
        )
    return outcome


def allows(state: State, event: Event) -> bool:
    return event in TABLE[state]

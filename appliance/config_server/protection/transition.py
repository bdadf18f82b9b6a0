"""Putting an event to a machine's row: the table decides, the row follows."""

from appliance.config_server.protection.table import (
    RECOVERING,
    RESYNCING,
    Command,
    Event,
    State,
    step,
)
from appliance.config_server.store.schema import Machine

_BACK = frozenset({Event.FAILOVER_FAILED, Event.CANCELLED})
KEPT, REMOVING, NO_POINTS = "kept", "removing", ""
"""What becomes of a machine's points (`Machine.points`)."""


def enter(
    machine: Machine, event: Event, now_ns: int, *, cause: str = "", reason: str = ""
) -> tuple[Command, ...]:
    """Change the row and return what follows. Raises IllegalTransitionError.

    A resync that a failover came in between of is required again when the failover comes to
    nothing: what the agent has to say of it, it says by itself.
    """
    state, commands = step(State(machine.state), event, machine=machine.name)
    if event in _BACK and machine.cause:
        state, _ = step(state, Event.RESYNC_REQUIRED)
    if state != machine.state:
        machine.since_ns = now_ns
    machine.state = state
    if state not in RESYNCING | RECOVERING:
        machine.cause = machine.reason = ""
    elif cause:
        machine.cause, machine.reason = cause, reason
    machine.revision += 1
    return commands


def forget_points(machine: Machine) -> None:
    """Its applier has deleted them: nothing ties the two any more."""
    machine.applier_id = None
    machine.points = NO_POINTS

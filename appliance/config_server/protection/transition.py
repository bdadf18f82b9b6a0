"""Putting an event to a machine's row: the table decides, the row follows."""

from appliance.config_server.protection.table import (
    RESYNCING,
    Command,
    Event,
    State,
    step,
)
from appliance.config_server.store.schema import Machine

KEPT, REMOVING, NO_POINTS = "kept", "removing", ""
"""What becomes of a machine's points (`Machine.points`)."""


def enter(
    machine: Machine, event: Event, now_ns: int, *, cause: str = "", reason: str = ""
) -> tuple[Command, ...]:
    """Change the row and return what follows. Raises IllegalTransitionError."""
    state, commands = step(State(machine.state), event, machine=machine.name)
    if state != machine.state:
        machine.since_ns = now_ns
    machine.state = state
    if state not in RESYNCING:
        machine.cause = machine.reason = ""
    elif cause:
        machine.cause, machine.reason = cause, reason
    machine.revision += 1
    return commands


def forget_points(machine: Machine) -> None:
    """Its applier has deleted them: nothing ties the two any more."""
    machine.applier_id = None
    machine.points = NO_POINTS

"""What of an assignment a node follows when the config server may have forgotten something.

A config server that was put back to an older backup counts from a lower version, and what it says
is as old: it may end protections and delete points that others rely on by now. So a node remembers
the highest version that it followed. From the first lower one on, it follows all but what destroys,
until somebody who knows confirms: that raises all versions by RESTORED_STEP. A version that has
merely counted up past the highest one confirms nothing.

Source: docs/CONTROL.md §4.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field

from replication.control.assignment import (
    REVOKED_COUNT_MAX,
    AppliedMachine,
    ApplierAssignment,
    ComputeAssignment,
    MachineAssignment,
    NodeAssignment,
    ProcessServerAssignment,
)
from replication.control.message import Message
from replication.control.recovery import HOLDS_MAX, Hold, VmPower

RESTORED_STEP = 1 << 32
"""By so much a confirmation raises the versions of all nodes."""

CONFIRMED_STEP = RESTORED_STEP // 2
"""A version that is so far above the highest one was raised by a confirmation; a memory that lost
more changes than this is not known.
"""

A = TypeVar("A", bound=NodeAssignment)


class Followed(Message):
    """highest: version of what was followed wholly. is_older: a lower one has come since."""

    highest: Annotated[int, Field(ge=0)] = 0
    is_older: bool = False


@dataclass(frozen=True, slots=True)
class Judged:
    """What is remembered from now on, and whether the assignment may be followed wholly."""

    followed: Followed
    wholly: bool


def judge(followed: Followed, version: int) -> Judged:
    """Judge an assignment by its version."""
    least = followed.highest + (CONFIRMED_STEP if followed.is_older else 0)
    if version >= least:
        return Judged(Followed(highest=version), wholly=True)
    return Judged(Followed(highest=followed.highest, is_older=True), wholly=False)


def without_losses(assignment: A, before: A | None) -> A:
    """``assignment`` but for what destroys; ``before``: what is followed now, if it is known.

    An agent goes on as before when it is told to forget, and stops no machine for a failover that
    may have been called off since; a process server and an applier let go of nothing, a certificate
    that is revoked stays so, points are thinned no sooner, and holds stay; a compute node removes
    no VM and switches none off.
    """
    kept: NodeAssignment
    match assignment, before:
        case MachineAssignment(), (MachineAssignment() | None):
            kept = _machine(assignment, before)
        case ProcessServerAssignment(), (ProcessServerAssignment() | None):
            kept = _process_server(assignment, before)
        case ApplierAssignment(), (ApplierAssignment() | None):
            kept = _applier(assignment, before)
        case ComputeAssignment(), (ComputeAssignment() | None):
            kept = _compute(assignment, before)
        case _:
            raise AssertionError(f"{type(assignment).__name__} is an assignment of no role")
    assert isinstance(kept, type(assignment))
    return kept


def _machine(newer: MachineAssignment, before: MachineAssignment | None) -> MachineAssignment:
    if newer.protected or (before is not None and not before.protected):
        return newer.model_copy(update={"final": 0})
    if before is not None and before.machine == newer.machine:
        return before.model_copy(update={"version": newer.version, "final": 0})
    # What there was is not known: it stays, and the kernel goes on tracking.
    return newer.model_copy(update={"protected": True, "replicate": False, "final": 0})


def _process_server(
    newer: ProcessServerAssignment, before: ProcessServerAssignment | None
) -> ProcessServerAssignment:
    revoked = dict.fromkeys((*newer.revoked, *(before.revoked if before else ())))
    kept = tuple(revoked)[:REVOKED_COUNT_MAX]
    return newer.model_copy(update={"ended": (), "revoked": kept})


def _applier(newer: ApplierAssignment, before: ApplierAssignment | None) -> ApplierAssignment:
    known = {machine.id: machine for machine in before.machines} if before else {}
    machines = tuple(_no_sooner(each, known.get(each.id)) for each in newer.machines)
    holds = _holds(newer.holds, before.holds if before else ())
    return newer.model_copy(update={"removed": (), "machines": machines, "holds": holds})


def _holds(newer: Iterable[Hold], before: Iterable[Hold]) -> tuple[Hold, ...]:
    kept = {hold.id: hold for hold in before}
    named = []
    for hold in newer:
        known = kept.pop(hold.id, hold)
        until_ns = max(hold.until_ns, known.until_ns)
        named.append(hold.model_copy(update={"until_ns": until_ns}))
    return (*named, *kept.values())[:HOLDS_MAX]  # the applier lets go of none of the others


def _compute(newer: ComputeAssignment, before: ComputeAssignment | None) -> ComputeAssignment:
    on = {order.id for order in before.vms if order.power is VmPower.ON} if before else set()
    vms = tuple(
        order.model_copy(update={"power": VmPower.ON}) if order.id in on else order
        for order in newer.vms
    )
    return newer.model_copy(update={"removed": (), "vms": vms})


def _no_sooner(newer: AppliedMachine, before: AppliedMachine | None) -> AppliedMachine:
    if before is None:
        return newer
    return newer.model_copy(
        update={
            "retention_seconds": max(newer.retention_seconds, before.retention_seconds),
            "crash_frequency_seconds": min(
                newer.crash_frequency_seconds, before.crash_frequency_seconds
            ),
        }
    )

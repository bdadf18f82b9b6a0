"""A node's assignment as a pure function of the rows that it depends on.

Source: docs/CONTROL.md §4.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from appliance.config_server.protection.table import REPLICATING, State
from appliance.config_server.protection.transition import NO_POINTS, REMOVING
from appliance.config_server.protection.window import resync_allowed
from appliance.config_server.store.schema import Machine, Node, Policy, ProtectedDisk
from replication.control.assignment import (
    AppliedMachine,
    ApplierAssignment,
    AssignedDisk,
    ComputeAssignment,
    MachineAssignment,
    ProcessServerAssignment,
    ResyncOrder,
)


@dataclass(frozen=True, slots=True)
class Protected:
    """A machine and, while it has one, its policy."""

    machine: Machine
    policy: Policy | None


def for_machine(
    node: Node,
    protected: Protected | None,
    disks: Iterable[ProtectedDisk],
    *,
    process_server_url: str,
    now_ns: int,
) -> MachineAssignment:
    """For an agent. Without a row in ``machines`` it is enrolled and nothing more is wanted."""
    machine = protected.machine if protected else None
    if protected is None or machine is None or machine.state not in REPLICATING:
        return MachineAssignment(
            version=node.assignment_version,
            machine=node.id,
            name=machine.name if machine else node.name,
            protected=False,
        )
    policy = protected.policy
    return MachineAssignment(
        version=node.assignment_version,
        machine=node.id,
        name=machine.name,
        protected=True,
        # Without an address there is nowhere to send to: it tracks, and waits for one.
        replicate=bool(process_server_url),
        process_server=process_server_url,
        disks=tuple(
            AssignedDisk(
                # Its lasting name: the path is another one after a restart, perhaps.
                index=disk.index,
                device=disk.device_id,
                name=disk.name,
                size_bytes=disk.size_bytes,
            )
            for disk in sorted(disks, key=lambda disk: disk.index)
            if not disk.excluded
        ),
        app_interval_seconds=policy.app_frequency_seconds if policy else 0,
        resync=ResyncOrder(
            request=machine.resync_request,
            allowed=policy is None or resync_allowed(policy.resync_window, now_ns),
        ),
    )


def for_process_server(
    node: Node, machines: Iterable[Machine], revoked: Sequence[str]
) -> ProcessServerAssignment:
    """For a process server, of all machines: its own stay until their protection has ended, so
    that what is spooled gets through; then it may let go of what is left. Where the points are to
    go, nobody takes what is spooled: it is let go of at once.
    """
    known = list(machines)
    taken = {
        machine.id
        for machine in known
        if machine.process_server_id == node.id
        and machine.state != State.UNPROTECTED
        and machine.points != REMOVING
    }
    ended = {machine.id for machine in known} - taken
    return ProcessServerAssignment(
        version=node.assignment_version,
        machines=tuple(sorted(taken)),
        ended=tuple(sorted(ended)),
        revoked=tuple(revoked),
    )


def for_applier(node: Node, protected: Iterable[Protected]) -> ApplierAssignment:
    """For an applier: all that it has points of, and whose points are to go."""
    applied = []
    removed = []
    for each in sorted(protected, key=lambda each: each.machine.id):
        machine = each.machine
        if machine.points == REMOVING:
            removed.append(machine.id)
        elif machine.points != NO_POINTS or machine.state != State.UNPROTECTED:
            applied.append(_applied(machine, each.policy))
    return ApplierAssignment(
        version=node.assignment_version, machines=tuple(applied), removed=tuple(removed)
    )


def for_compute(node: Node) -> ComputeAssignment:
    """For a compute node: nothing is to run there."""
    return ComputeAssignment(version=node.assignment_version)


def _applied(machine: Machine, policy: Policy | None) -> AppliedMachine:
    """Points of a machine that is not protected any more stay as they are: nothing thins them."""
    live = machine.state != State.UNPROTECTED
    if policy is None:
        return AppliedMachine(id=machine.id, name=machine.name, keep=False, apply=live)
    return AppliedMachine(
        id=machine.id,
        name=machine.name,
        keep=live,
        apply=live,
        retention_seconds=policy.retention_seconds,
        crash_frequency_seconds=policy.crash_frequency_seconds,
    )

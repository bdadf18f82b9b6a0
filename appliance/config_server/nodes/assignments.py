"""A node's assignment as a pure function of the rows that it depends on.

Source: docs/CONTROL.md §4.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from appliance.config_server.protection.table import RECOVERING, SENDING, State
from appliance.config_server.protection.transition import NO_POINTS, REMOVING
from appliance.config_server.protection.window import resync_allowed
from appliance.config_server.store.recovery_tables import PointHold, RecoveredVm
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
from replication.control.recovery import Hold, VirtualMachineOrder, VmPower

REMOVED = "removed"
"""What is wanted of a VM that is to go; else it is a `VmPower`."""


FINAL_SECONDS_MAX = 300.0
"""From the order for a final changeset on: the source must be off before, or its agent thaws."""


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
    """For an agent. Without a row in ``machines`` it is enrolled and nothing more is wanted.

    Of a machine that is failed over it tracks the disks and sends nothing: when the failover is
    taken back, only what changed meanwhile is to be sent.
    """
    machine = protected.machine if protected else None
    if protected is None or machine is None or machine.state not in SENDING | RECOVERING:
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
        replicate=bool(process_server_url) and machine.state in SENDING,
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
        final=machine.final_order if machine.final_wanted else 0,
        final_seconds_max=FINAL_SECONDS_MAX,
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


def for_applier(
    node: Node, protected: Iterable[Protected], holds: Iterable[PointHold] = ()
) -> ApplierAssignment:
    """For an applier: all that it has points of, whose points are to go, and what it holds."""
    applied = []
    removed = []
    for each in sorted(protected, key=lambda each: each.machine.id):
        machine = each.machine
        if machine.points == REMOVING:
            removed.append(machine.id)
        elif machine.points != NO_POINTS or machine.state != State.UNPROTECTED:
            applied.append(_applied(machine, each.policy))
    return ApplierAssignment(
        version=node.assignment_version,
        machines=tuple(applied),
        removed=tuple(removed),
        holds=tuple(
            Hold(
                id=hold.id,
                machine=hold.machine_id,
                choice=hold.choice,
                generation=hold.generation,
                number=hold.number,
                until_ns=hold.until_ns,
            )
            for hold in sorted(holds, key=lambda hold: hold.id)
            if hold.applier_id == node.id and hold.ended_ns is None
        ),
    )


def for_compute(node: Node, vms: Iterable[RecoveredVm] = ()) -> ComputeAssignment:
    """For a compute node: the VMs that should be there, and those that are to go."""
    there = [
        vm
        for vm in sorted(vms, key=lambda vm: vm.id)
        if vm.compute_id == node.id and vm.gone_ns is None
    ]
    return ComputeAssignment(
        version=node.assignment_version,
        vms=tuple(_order(vm) for vm in there if vm.wanted != REMOVED),
        removed=tuple(vm.id for vm in there if vm.wanted == REMOVED),
    )


def _order(vm: RecoveredVm) -> VirtualMachineOrder:
    return VirtualMachineOrder.model_validate(
        {
            **vm.document,
            "id": vm.id,
            "machine": vm.machine_id,
            "power": VmPower(vm.wanted),
            "independent": vm.independent,
        }
    )


def _applied(machine: Machine, policy: Policy | None) -> AppliedMachine:
    """Points of a machine that is not protected any more, or is failed over, stay as they are:
    nothing thins them.
    """
    live = machine.state != State.UNPROTECTED
    keep = live and machine.state not in RECOVERING
    if policy is None:
        return AppliedMachine(id=machine.id, name=machine.name, keep=False, apply=live)
    return AppliedMachine(
        id=machine.id,
        name=machine.name,
        keep=keep,
        apply=live,
        retention_seconds=policy.retention_seconds,
        crash_frequency_seconds=policy.crash_frequency_seconds,
    )

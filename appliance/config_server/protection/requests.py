"""What people ask of a machine: each is one transaction that checks, writes the new state, and adds
the job that acts. Whoever comes second finds the first one's state.

Source: docs/CONTROL.md §6, §9.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.discovery.matching import vm_of
from appliance.config_server.protection.jobs import JobKind, new_job
from appliance.config_server.protection.machines import (
    agent_report,
    candidates,
    disks_of,
    find_node,
    heard_of,
    lock_machine,
    lock_placement,
    next_order,
    refuse_busy,
)
from appliance.config_server.protection.placement import (
    ChosenDisk,
    PlacementError,
    choose,
    choose_disks,
    find_device,
)
from appliance.config_server.protection.policies import find_policy
from appliance.config_server.protection.policy import REPLICATION
from appliance.config_server.protection.table import Event, State, step
from appliance.config_server.protection.transition import KEPT, REMOVING, enter
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.protection.workflows import WORKFLOWS
from appliance.config_server.recovery.room import refuse_held_points
from appliance.config_server.recovery.settling import refuse_at_work
from appliance.config_server.store.schema import (
    Job,
    Machine,
    Node,
    ProtectedDisk,
)
from replication.control.report import ResyncCause
from replication.control.role import NodeRole
from replication.errors import ConflictError, InputError, NotFoundError


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks, when, and what the answer is made from."""

    session: AsyncSession
    ports: Ports
    now_ns: int
    who: str


async def protect(
    asking: Asking,
    reference: str,
    *,
    policy: str,
    disks: tuple[str, ...] | None = None,
    process_server: str | None = None,
    applier: str | None = None,
) -> Job:
    """Begin to protect a machine. ``disks``: by device or id; none: all."""
    session, ports, now_ns = asking.session, asking.ports, asking.now_ns
    node = await find_node(session, reference, now_ns)
    machine = await _machine_for(asking, node)
    await refuse_busy(session, machine)
    step(State(machine.state), Event.PROTECT_ASKED, machine=machine.name)
    if machine.points == REMOVING:
        raise ConflictError(
            f"the points of {machine.name} are being deleted",
            hint="wait until its applier has done so, then protect it",
        )
    await _refuse_twin(session, node)
    chosen_policy = await find_policy(session, policy)
    if chosen_policy.kind != REPLICATION:
        raise InputError(f"{policy} is a failback policy", hint="name a replication policy")
    report = await agent_report(ports, node, now_ns)
    rows = {disk.device_id: disk for disk in await disks_of(session, node.id)}
    chosen = choose_disks(report.devices, disks, {name: row.index for name, row in rows.items()})
    had_points = machine.points == KEPT
    taker = str(machine.applier_id) if had_points and applier is None else applier
    await lock_placement(session)
    server = choose(
        await candidates(session, ports, NodeRole.PROCESS_SERVER, now_ns, placed=node.id),
        process_server,
        what="process server",
    )
    store = choose(
        await candidates(session, ports, NodeRole.APPLIER, now_ns, placed=node.id),
        taker,
        what="applier",
    )
    if had_points and store.id != machine.applier_id:
        raise ConflictError(
            f"another applier has points of {machine.name}",
            hint="leave the applier out, or have these points removed first",
        )
    for disk in chosen:
        if disk.device.id in rows:
            _refresh(rows[disk.device.id], disk)
        else:
            session.add(_disk_row(machine, disk))
    machine.policy_id = chosen_policy.id
    machine.process_server_id = server.id
    machine.applier_id = store.id
    machine.points = KEPT
    machine.vm_id = await vm_of(session, node)
    return _ask(asking, machine, Event.PROTECT_ASKED, JobKind.PROTECT, {"had_points": had_points})


async def unprotect(asking: Asking, reference: str, *, keep_points: bool) -> Job:
    """End a machine's protection; or delete the points that were kept when it ended. VMs of tests
    and of a failover that is not committed go; a committed one is somebody's machine and stays.
    """
    machine = await _known(asking, reference)
    await refuse_busy(asking.session, machine)
    event = Event.UNPROTECT_ASKED
    if machine.state == State.UNPROTECTED and machine.points and not keep_points:
        event = Event.POINTS_REMOVAL_ASKED
    step(State(machine.state), event, machine=machine.name)
    if keep_points and machine.points == REMOVING:
        raise ConflictError(
            f"the applier was told to delete the points of {machine.name}: they cannot be kept",
            hint="unprotect it without keeping the points",
        )
    if not keep_points:
        await refuse_held_points(asking.session, machine, asking.now_ns)
    await refuse_at_work(asking.session, machine)
    # Only the step that tells the applier marks them: a job that ends before it keeps them.
    return _ask(asking, machine, event, JobKind.UNPROTECT, {"keep_points": keep_points})


async def add_disk(asking: Asking, reference: str, name: str) -> Job:
    """Replicate one more disk of a protected machine, also one that was excluded."""
    session = asking.session
    machine = await _known(asking, reference)
    await refuse_busy(session, machine)
    step(State(machine.state), Event.DISK_ADDED, machine=machine.name)
    node = await session.get_one(Node, machine.id)
    device = find_device((await agent_report(asking.ports, node, asking.now_ns)).devices, name)
    if device.reason:
        raise PlacementError(f"{device.device} cannot be tracked: {device.reason}")
    rows = await disks_of(session, machine.id)
    row = next((disk for disk in rows if disk.device_id == device.id), None)
    if row is not None and not row.excluded:
        raise ConflictError(f"{device.device} of {machine.name} is replicated already")
    index = row.index if row else max((disk.index for disk in rows), default=-1) + 1
    chosen = ChosenDisk(index, device, excluded=False)
    if row is None:
        session.add(_disk_row(machine, chosen))
    else:
        _refresh(row, chosen)
    return _ask(asking, machine, Event.DISK_ADDED, JobKind.ADD_DISK, {"index": index})


async def exclude_disk(asking: Asking, reference: str, index: int) -> Job:
    """Replicate a disk no more; it stays excluded. Not the system disk, nor the last one."""
    session = asking.session
    machine = await _known(asking, reference)
    await refuse_busy(session, machine)
    step(State(machine.state), Event.DISK_EXCLUDED, machine=machine.name)
    rows = {disk.index: disk for disk in await disks_of(session, machine.id)}
    row = rows.get(index)
    if row is None or row.excluded:
        raise NotFoundError(
            f"{machine.name} has no replicated disk {index}",
            hint=f"it has {', '.join(str(n) for n, disk in rows.items() if not disk.excluded)}",
        )
    if sum(not disk.excluded for disk in rows.values()) == 1:
        raise InputError(
            f"disk {index} is the only one of {machine.name} that is replicated",
            hint="unprotect the machine instead",
        )
    node = await session.get_one(Node, machine.id)
    report = await agent_report(asking.ports, node, asking.now_ns)
    if any(device.is_system and device.id == row.device_id for device in report.devices):
        raise InputError(
            f"disk {index} ({row.device}) is the system disk of {machine.name}",
            hint="the machine could not be started at the second site without it",
        )
    row.excluded = True
    return _ask(asking, machine, Event.DISK_EXCLUDED, JobKind.EXCLUDE_DISK, {"index": index})


async def resync(asking: Asking, reference: str, *, now: bool) -> Job:
    """Order a resync: now, or when the policy's window opens."""
    machine = await _known(asking, reference)
    await refuse_busy(asking.session, machine)
    if now:
        node = await asking.session.get_one(Node, machine.id)
        machine.resync_request = next_order(machine, heard_of(asking.ports, node))
    machine.resync_in_window = not now
    cause = machine.cause or ResyncCause.OPERATOR.value
    reason = machine.reason or f"asked for by {asking.who}"
    return _ask(
        asking,
        machine,
        Event.RESYNC_ASKED,
        JobKind.RESYNC,
        {"now": now, "order": machine.resync_request},
        cause=cause,
        reason=reason,
    )


def _ask(
    asking: Asking,
    machine: Machine,
    event: Event,
    kind: JobKind,
    request: dict[str, Any],
    *,
    cause: str = "",
    reason: str = "",
) -> Job:
    """Write the new state and the job that goes with it."""
    enter(machine, event, asking.now_ns, cause=cause, reason=reason)
    job = new_job(
        asking.session,
        kind,
        target_id=machine.id,
        target=machine.name,
        steps=tuple(each.name for each in WORKFLOWS[kind].steps),
        request=request,
        asked_by=asking.who,
        now_ns=asking.now_ns,
    )
    machine.job_id = job.id
    return job


async def _known(asking: Asking, reference: str) -> Machine:
    """The locked row of a machine that is or was protected."""
    node = await find_node(asking.session, reference, asking.now_ns)
    return await _machine_for(asking, node)


async def _machine_for(asking: Asking, node: Node) -> Machine:
    """Its row, locked; a new one where it never had any. Raises ConflictError for a name in use."""
    machine = await lock_machine(asking.session, node.id)
    if machine is not None:
        return machine
    insert = postgresql.insert if _is_postgresql(asking.session) else sqlite.insert
    new = {"id": node.id, "name": node.name, "state": State.UNPROTECTED, "since_ns": asking.now_ns}
    # Of two operators, here the second one waits for the first, then finds the first one's row.
    await asking.session.execute(insert(Machine).values(new).on_conflict_do_nothing())
    machine = await lock_machine(asking.session, node.id)
    if machine is not None:
        return machine
    taken = await asking.session.scalar(select(Machine.id).where(Machine.name == node.name))
    raise ConflictError(
        f"another machine is called {node.name}: {taken}",
        hint="give one of them another name and enrol it again",
    )


def _is_postgresql(session: AsyncSession) -> bool:
    return session.get_bind().dialect.name == "postgresql"


async def _refuse_twin(session: AsyncSession, node: Node) -> None:
    """Two machines with one BIOS UUID are clones, or one machine that was enrolled twice."""
    if node.bios_uuid is None:
        return
    twin = await session.scalar(
        select(Machine.name)
        .join(Node, Node.id == Machine.id)
        .where(
            Node.bios_uuid == node.bios_uuid,
            Machine.id != node.id,
            Machine.state != State.UNPROTECTED,
        )
    )
    if twin is not None:
        raise ConflictError(
            f"{twin} has the same BIOS UUID as {node.name} and is protected",
            hint="give a clone a BIOS UUID of its own; unprotect the old one of a machine that "
            "was enrolled twice",
        )


def _disk_row(machine: Machine, disk: ChosenDisk) -> ProtectedDisk:
    row = ProtectedDisk(machine_id=machine.id, index=disk.index)
    _refresh(row, disk)
    return row


def _refresh(row: ProtectedDisk, disk: ChosenDisk) -> None:
    row.device_id = disk.device.id
    row.device = disk.device.device
    row.name = disk.device.device.rsplit("/", 1)[-1]
    row.size_bytes = disk.device.size_bytes
    row.excluded = disk.excluded

"""Machines in the database: found by name or id, and what is known of their nodes.

Source: docs/CONTROL.md §6, §9.
"""

import uuid
from collections.abc import Sequence

from sqlalchemy import ColumnElement, exists, func, or_, select, true
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.discovery.inventory import swapped
from appliance.config_server.nodes.report_book import Heard, newest_of
from appliance.config_server.protection.placement import Candidate
from appliance.config_server.protection.table import State
from appliance.config_server.protection.transition import NO_POINTS
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.store.schema import (
    Certificate,
    Job,
    Machine,
    Node,
    ProtectedDisk,
    VirtualMachine,
)
from replication.control.report import MachineReport, ProcessServerReport
from replication.control.role import NodeRole
from replication.control.value import COUNT_MAX
from replication.errors import ConflictError, NotFoundError

HEARD_SECONDS_MAX = 60
"""Who was not heard for longer is not given work: three reports and some."""

CARRIED_OUT_MAX = COUNT_MAX - (1 << 32)
"""An agent that says it has carried out more orders is not believed: none could follow."""

_SECOND_NS = 10**9
_PLACEMENT_LOCK = 0x756E64706C61
_OUT = "it has no certificate that is good"


class AgentMissingError(NotFoundError):
    """The machine is in a vCenter's inventory, but no agent of it is enrolled."""

    code = "agent_missing"


class BusyError(ConflictError):
    """A job is at work on the machine."""

    code = "busy"


async def find_node(session: AsyncSession, reference: str, now_ns: int) -> Node:
    """The machine's node by its id; by its name if no id fits, while its certificate is good.

    A name is what a node says of itself: it may be another one's id, or that of a node which is
    out. Raises NotFoundError, AgentMissingError for a VM whose agent is not enrolled,
    ConflictError for a name that two have.
    """
    machines = select(Node).where(Node.role == NodeRole.MACHINE)
    node_id = uuid_of(reference)
    by_id = await session.scalar(machines.where(Node.id == node_id)) if node_id else None
    if by_id is not None:
        return by_id
    named = machines.where(Node.name == reference)
    found = (await session.scalars(named.where(has_live_certificate(now_ns)).limit(2))).all()
    if len(found) == 1:
        return found[0]
    if found:
        raise ConflictError(
            f"more than one machine is called {reference}", hint="name it by its id"
        )
    out = await session.scalar(named.order_by(Node.enrolled_ns.desc()).limit(1))
    if out is not None:
        raise NotFoundError(
            f"no machine that is called {reference} has a certificate that is good",
            hint=f"name it by its id: {out.id}",
        )
    await _refuse_without_agent(session, reference)
    raise NotFoundError(
        f"there is no machine {reference}", hint="`understudy machines` lists those enrolled"
    )


def has_live_certificate(now_ns: int) -> ColumnElement[bool]:
    """Of a ``Node``: one that is neither revoked nor over."""
    return exists().where(
        Certificate.node_id == Node.id,
        Certificate.revoked_ns.is_(None),
        Certificate.expires_ns > now_ns,
    )


def uuid_of(text: str) -> uuid.UUID | None:
    """None for what is no UUID."""
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


async def _refuse_without_agent(session: AsyncSession, reference: str) -> None:
    """For a VM of the inventory: go on with its agent, or say how to get one."""
    query = select(VirtualMachine).where(
        VirtualMachine.removed_ns.is_(None),
        or_(VirtualMachine.name == reference, VirtualMachine.id == uuid_of(reference)),
    )
    vm = await session.scalar(query.limit(1))
    if vm is None:
        return
    agent = None
    if vm.bios_uuid is not None:
        agent = await session.scalar(
            select(Node.name)
            .where(
                Node.role == NodeRole.MACHINE,
                Node.bios_uuid.in_((vm.bios_uuid, swapped(vm.bios_uuid))),
            )
            .order_by(Node.enrolled_ns)
            .limit(1)
        )
    if agent is not None:
        raise NotFoundError(
            f"the virtual machine {vm.name} has an agent that is called {agent}",
            hint=f"say {agent}",
        )
    raise AgentMissingError(
        f"the virtual machine {vm.name} is in the inventory, but its agent is not enrolled",
        hint="install the mobility agent on it and enrol it with the config server's address and "
        "the enrolment passphrase; then it can be protected",
    )


async def lock_machine(session: AsyncSession, node: uuid.UUID) -> Machine | None:
    """The machine's row, kept from others until the transaction ends; none if it never had one."""
    return await session.scalar(
        select(Machine)
        .where(Machine.id == node)
        .with_for_update()
        .execution_options(populate_existing=True)
    )


async def refuse_busy(session: AsyncSession, machine: Machine) -> None:
    """Raises BusyError that tells which job is at work, and whose it is."""
    if machine.job_id is None:
        return
    job = await session.get(Job, machine.job_id)
    told = f"{job.kind}, asked for by {job.asked_by}" if job is not None else "unknown"
    raise BusyError(
        f"a job is at work on {machine.name}, which is {machine.state}: {machine.job_id} ({told})",
        hint=f"wait for it or cancel it: `understudy jobs {machine.job_id} --follow`",
    )


def heard_of(ports: Ports, node: Node) -> Heard | None:
    """The newest report of a node, from memory or from its row."""
    return newest_of(node, ports.newest(node.id))


def next_order(machine: Machine, heard: Heard | None) -> int:
    """The number of the next resync that is ordered: above all that its agent has carried out.

    A database that was put back to an older backup counts from less than the agent, which would
    take the order for one that is done.
    """
    report = heard.report if heard is not None else None
    carried_out = report.resync_request if isinstance(report, MachineReport) else 0
    return _above(machine.resync_request, carried_out)


def next_final(machine: Machine, heard: Heard | None) -> int:
    """The number of the next order for a final changeset, likewise."""
    report = heard.report if heard is not None else None
    carried_out = report.final if isinstance(report, MachineReport) else 0
    return _above(machine.final_order, carried_out)


def _above(ordered: int, carried_out: int) -> int:
    """What an agent says is bounded: whatever that is, there are orders left to be given."""
    return max(ordered, min(carried_out, CARRIED_OUT_MAX)) + 1


async def agent_report(ports: Ports, node: Node, now_ns: int) -> MachineReport:
    """What a machine's agent said lately. Raises ConflictError when it is silent."""
    heard = heard_of(ports, node)
    if heard is None or not isinstance(heard.report, MachineReport):
        raise ConflictError(
            f"the agent of {node.name} is enrolled, but has never reported",
            hint="see that it runs and reaches the config server",
        )
    silent = (now_ns - heard.seen_ns) // _SECOND_NS
    if silent > HEARD_SECONDS_MAX:
        raise ConflictError(
            f"the agent of {node.name} was last heard of {silent} s ago",
            hint="see that it runs and reaches the config server",
        )
    return heard.report


async def lock_placement(session: AsyncSession) -> None:
    """Until the transaction ends nobody else places a machine: two would both count the same room.

    On SQLite there is only one writer anyway.
    """
    if session.get_bind().dialect.name == "postgresql":
        await session.execute(select(func.pg_advisory_xact_lock(_PLACEMENT_LOCK)))


async def candidates(
    session: AsyncSession,
    ports: Ports,
    role: NodeRole,
    now_ns: int,
    *,
    placed: uuid.UUID | None = None,
) -> Sequence[Candidate]:
    """All enrolled nodes of a role, with their load and why they take no more.

    placed: the machine that is to be placed, which takes no room of what it has already.
    """
    is_working = Machine.state != State.UNPROTECTED
    column, is_assigned = Machine.process_server_id, is_working
    if role is not NodeRole.PROCESS_SERVER:
        # An applier is told of machines whose points it keeps or is to delete, too.
        column, is_assigned = Machine.applier_id, is_working | (Machine.points != NO_POINTS)
    others = true() if placed is None else Machine.id != placed
    counted = await session.execute(
        select(column, func.count().filter(is_working), func.count().filter(others))
        .where(column.is_not(None), is_assigned)
        .group_by(column)
    )
    counts = {row[0]: (row[1], row[2]) for row in counted}
    nodes = await session.execute(
        select(Node, has_live_certificate(now_ns)).where(Node.role == role)
    )
    return [
        await _candidate(ports, node, *counts.get(node.id, (0, 0)), now_ns)
        if is_live
        else Candidate(node.id, node.name, trouble=_OUT, is_live=False)
        for node, is_live in nodes.all()
    ]


async def _candidate(
    ports: Ports, node: Node, count: int, assigned_count: int, now_ns: int
) -> Candidate:
    heard = heard_of(ports, node)
    if heard is None:
        return Candidate(node.id, node.name, count, trouble="it has never reported")
    silent = (now_ns - heard.seen_ns) // _SECOND_NS
    trouble = f"it was last heard of {silent} s ago" if silent > HEARD_SECONDS_MAX else ""
    for part in heard.report.troubles:
        if part.severity == "critical":
            trouble = trouble or f"{part.part}: {part.reason}"
    fill = 0.0
    if isinstance(heard.report, ProcessServerReport):
        if not heard.report.url:
            trouble = trouble or "it does not say where agents reach it"
        if heard.report.spool_max_bytes:
            fill = heard.report.spool_bytes / heard.report.spool_max_bytes
    return Candidate(node.id, node.name, count, fill, trouble, assigned_count=assigned_count)


async def disks_of(session: AsyncSession, machine: uuid.UUID) -> Sequence[ProtectedDisk]:
    return (
        await session.scalars(
            select(ProtectedDisk)
            .where(ProtectedDisk.machine_id == machine)
            .order_by(ProtectedDisk.index)
        )
    ).all()

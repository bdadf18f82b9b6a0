"""What is left when a failover ends: VMs that are to go, then the holds that they needed.

A hold stays in its applier's assignment until the VM that reads from its point is gone or stands
alone. Whoever looks first writes it down: the job that waits for it, or the round that every config
server makes for what no job waits for any more.

Source: docs/RECOVERY.md §2, §4.
"""

import uuid
from collections.abc import Awaitable, Callable, Iterable, Sequence

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.assignments import REMOVED
from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.protection.machines import (
    BusyError,
    has_live_certificate,
    lock_machine,
)
from appliance.config_server.protection.table import Event, State
from appliance.config_server.protection.transition import enter
from appliance.config_server.recovery.decisions import hold_is_needed, settled_state
from appliance.config_server.recovery.run import OPEN, FailoverState
from appliance.config_server.store.recovery_tables import Failover, PointHold, RecoveredVm
from appliance.config_server.store.schema import Machine, Node
from replication.control.recovery import VmPower
from replication.control.report import ComputeReport

Hear = Callable[[uuid.UUID], Awaitable[Heard | None]]
"""The newest report of a node."""


async def settle(
    session: AsyncSession, failovers: Sequence[Failover], hear: Hear, now_ns: int
) -> set[uuid.UUID]:
    """Write down what is gone of some failovers, which are locked, and end what that had needed.

    Returns the nodes that are to be told. What names a job is ended by that job.
    """
    ids = [failover.id for failover in failovers]
    tell = await _note_gone(session, ids, hear, now_ns)
    vms = (await session.scalars(select(RecoveredVm).where(RecoveredVm.failover_id.in_(ids)))).all()
    holds = await session.scalars(
        select(PointHold).where(PointHold.failover_id.in_(ids), PointHold.ended_ns.is_(None))
    )
    by_id = {failover.id: failover for failover in failovers}
    for hold in holds:
        assert hold.failover_id is not None
        failover = by_id[hold.failover_id]
        users = [(vm.gone_ns is not None, vm.is_independent) for vm in vms if vm.hold_id == hold.id]
        state = FailoverState(failover.state)
        if not hold_is_needed(users, state, has_job=failover.job_id is not None):
            hold.ended_ns = now_ns
            tell.add(hold.applier_id)
    for failover in failovers:
        own = [vm for vm in vms if vm.failover_id == failover.id]
        tell |= _switched_on_again(failover, own)
        state_now = settled_state(
            FailoverState(failover.state),
            [vm.gone_ns is not None for vm in own],
        )
        if state_now is not None and failover.job_id is None:
            end(failover, state_now, now_ns)
            machine = await session.get(Machine, failover.machine_id)
            if state_now is FailoverState.CANCELLED and machine is not None:
                tell |= back_to_protected(machine, now_ns)
    return tell


def _switched_on_again(failover: Failover, vms: Sequence[RecoveredVm]) -> set[uuid.UUID]:
    """The VM that was to give way to one of another point, when that one came to nothing and is
    gone: both are the same machine to the network. Returns the compute node that is to be told.
    """
    others_gone = all(vm.gone_ns is not None for vm in vms if vm.id != failover.vm_id)
    own = next((vm for vm in vms if vm.id == failover.vm_id), None)
    if (
        own is None
        or failover.job_id is not None
        or failover.state != FailoverState.UP
        or own.wanted != VmPower.OFF
        or not others_gone
    ):
        return set()
    own.wanted = VmPower.ON.value
    return {own.compute_id}


def end(failover: Failover, state: FailoverState, now_ns: int) -> None:
    """It is over."""
    failover.state, failover.ended_ns, failover.job_id = state, now_ns, None
    failover.revision += 1


def back_to_protected(machine: Machine, now_ns: int) -> set[uuid.UUID]:
    """Its failover is taken back; returns who is to be told. Of another state: nothing is to be."""
    if machine.state != State.CANCELLING:
        return set()
    enter(machine, Event.CANCELLED, now_ns)
    return nodes_of(machine)


def nodes_of(machine: Machine) -> set[uuid.UUID]:
    """All that have to do with its replication."""
    known = (machine.id, machine.process_server_id, machine.applier_id)
    return {node for node in known if node is not None}


async def _note_gone(
    session: AsyncSession, ids: Iterable[uuid.UUID], hear: Hear, now_ns: int
) -> set[uuid.UUID]:
    query = select(RecoveredVm).where(
        RecoveredVm.failover_id.in_(list(ids)), RecoveredVm.gone_ns.is_(None)
    )
    tell = set()
    for vm in (await session.scalars(query)).all():
        heard = await hear(vm.compute_id)
        report = heard.report if heard is not None else None
        if isinstance(report, ComputeReport):
            said = next((each for each in report.vms if each.id == vm.id), None)
            if said is not None and vm.independent and said.independent:
                vm.is_independent = True
        if vm.wanted == REMOVED and await _is_gone(session, vm, report, now_ns):
            vm.gone_ns = now_ns
            tell.add(vm.compute_id)
    return tell


async def _is_gone(session: AsyncSession, vm: RecoveredVm, report: object, now_ns: int) -> bool:
    """A compute node whose certificate is revoked or over is told nothing any more: what it had is
    no VM of ours.
    """
    if isinstance(report, ComputeReport) and vm.id in report.removed:
        return True
    is_live = select(Node.id).where(Node.id == vm.compute_id, has_live_certificate(now_ns))
    return await session.scalar(is_live) is None


async def drop_all(
    session: AsyncSession, machine: Machine
) -> tuple[list[Failover], set[uuid.UUID]]:
    """Have all VMs of a machine go whose failovers are not committed, since its protection ends.

    What is committed is somebody's machine now, and stays. Returns the failovers, and the compute
    nodes that are to be told.
    """
    query = (
        select(Failover)
        .where(
            Failover.machine_id == machine.id,
            Failover.state != FailoverState.COMMITTED,
            Failover.state.in_(OPEN)
            | Failover.id.in_(select(RecoveredVm.failover_id).where(RecoveredVm.gone_ns.is_(None))),
        )
        .order_by(Failover.id)
        .with_for_update()
    )
    failovers = list(await session.scalars(query))
    tell = set()
    for failover in failovers:
        if failover.state in (FailoverState.UP, FailoverState.STARTING):
            failover.state = (
                FailoverState.CLEANING if failover.kind == "test" else FailoverState.CANCELLING
            )
            failover.revision += 1
        tell |= await remove_vms(session, [failover.id])
    return failovers, tell


async def refuse_at_work(session: AsyncSession, machine: Machine) -> None:
    """Raises BusyError while a job is at work on a failover or test failover of the machine."""
    job = await session.scalar(
        select(Failover.job_id).where(
            Failover.machine_id == machine.id, Failover.job_id.is_not(None)
        )
    )
    if job is not None:
        raise BusyError(
            f"a job is at work on a failover of {machine.name}: {job}",
            hint=f"wait for it or cancel it: `understudy jobs {job} --follow`",
        )


async def remove_vms(session: AsyncSession, failovers: Iterable[uuid.UUID]) -> set[uuid.UUID]:
    """All VMs of some failovers are to go; returns the compute nodes that are to be told."""
    query = select(RecoveredVm).where(
        RecoveredVm.failover_id.in_(list(failovers)),
        RecoveredVm.gone_ns.is_(None),
        RecoveredVm.wanted != REMOVED,
    )
    tell = set()
    for vm in await session.scalars(query):
        vm.wanted = REMOVED
        tell.add(vm.compute_id)
    return tell


async def vms_left(session: AsyncSession, failovers: Iterable[Failover]) -> int:
    """How many VMs are still there, or may be."""
    query = (
        select(func.count())
        .select_from(RecoveredVm)
        .where(
            RecoveredVm.failover_id.in_([failover.id for failover in failovers]),
            RecoveredVm.gone_ns.is_(None),
        )
    )
    return await session.scalar(query) or 0


async def unsettled(session: AsyncSession) -> list[uuid.UUID]:
    """Failovers without a job of which something may be left: their ids."""
    going = (FailoverState.CLEANING, FailoverState.CANCELLING)
    vms = select(RecoveredVm.failover_id).where(
        RecoveredVm.gone_ns.is_(None), RecoveredVm.wanted == REMOVED
    )
    unused = select(PointHold.failover_id).where(
        PointHold.ended_ns.is_(None),
        PointHold.failover_id.is_not(None),
        PointHold.id.not_in(
            select(RecoveredVm.hold_id).where(
                RecoveredVm.gone_ns.is_(None), RecoveredVm.is_independent.is_(False)
            )
        ),
    )
    query = select(Failover.id).where(
        Failover.job_id.is_(None),
        Failover.state.in_(going) | Failover.id.in_(vms) | Failover.id.in_(unused),
    )
    return list(await session.scalars(query))


async def settle_one(
    session: AsyncSession, failover_id: uuid.UUID, hear: Hear, now_ns: int
) -> set[uuid.UUID]:
    """`settle`, for one that no job waits for. Returns the nodes that are to be told."""
    known = await session.get(Failover, failover_id)
    if known is None:
        return set()
    await lock_machine(session, known.machine_id)
    failover = await session.scalar(
        select(Failover)
        .where(Failover.id == failover_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    )
    if failover is None or failover.job_id is not None:
        return set()
    return await settle(session, [failover], hear, now_ns)


async def locks_over(session: AsyncSession, now_ns: int) -> Sequence[PointHold]:
    """Locks whose time is over and that are still held."""
    query = select(PointHold).where(
        PointHold.failover_id.is_(None),
        PointHold.ended_ns.is_(None),
        PointHold.until_ns <= now_ns,
    )
    return (await session.scalars(query)).all()


async def end_locks(session: AsyncSession, now_ns: int) -> set[uuid.UUID]:
    """They are held no more; returns the appliers that are to be told."""
    tell = set()
    for hold in await locks_over(session, now_ns):
        hold.ended_ns = now_ns
        tell.add(hold.applier_id)
    return tell

"""Letting go of failovers whose job could not undo what it had begun.

What may still be there of them is to go, and goes as soon as the compute node says so (`settling`),
or when somebody asks for it again. What is up stays. Nothing is asked of the table of states, of
options or of reports: what fails there is why this is needed.

| failover                    | of a test   | else           | its machine |
|-----------------------------|-------------|----------------|-------------|
| on its way up               | cleaning up | being cancelled| cancelling  |
| up, the job failed          | up          | up             | failed over |
| up, the job was cancelled   | cleaning up | being cancelled| cancelling  |
| going, or committed         | as it is    | as it is       | as it is    |

Source: docs/RECOVERY.md §4; docs/CONTROL.md §9.
"""

import uuid
from collections.abc import Iterable
from types import MappingProxyType

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.assignments import REMOVED
from appliance.config_server.protection.abandoning import (
    LOOK,
    NOTHING_LEFT,
    release_row,
    set_state,
)
from appliance.config_server.protection.jobs import JobKind
from appliance.config_server.protection.table import State
from appliance.config_server.protection.workflow import Left
from appliance.config_server.recovery.parts import PERHAPS_OFF, add_note
from appliance.config_server.recovery.run import ActionState, FailoverKind, FailoverState
from appliance.config_server.recovery.settling import nodes_of, remove_vms
from appliance.config_server.store.recovery_tables import (
    Failover,
    PlanAction,
    PlanRun,
    RecoveredVm,
)
from appliance.config_server.store.schema import Job, Machine

NAMES_TOLD_MAX = 10
_BEGINS = (JobKind.TEST_FAILOVER, JobKind.FAILOVER)

_WAYS_ON = MappingProxyType(
    {
        FailoverState.CLEANING: "its VM goes by itself; if it stays: "
        "`understudy failover cleanup {name}`",
        FailoverState.CANCELLING: "see that the source runs, it may be switched off; its VM goes "
        "by itself, and if it stays: `understudy failover cancel {name}`",
        FailoverState.UP: "clean it up if it is a test; else commit it or take it back: "
        "`understudy failover show {name}`",
    }
)


async def let_failovers_go(session: AsyncSession, job: Job, now_ns: int) -> Left:
    """All that name the job, their machines, and its run."""
    own = select(Machine).where(Machine.job_id == job.id).order_by(Machine.id)
    machines = {row.id: row for row in await session.scalars(own.with_for_update())}
    query = select(Failover).where(Failover.job_id == job.id).order_by(Failover.id)
    failovers = (await session.scalars(query.with_for_update())).all()
    takes_back = JobKind(job.kind) in _BEGINS and job.error is None
    tell = set()
    for row in failovers:
        row.state = _left_as(row, takes_back=takes_back)
        row.error = row.error or (None if row.state == FailoverState.UP else job.error)
        row.job_id = None
        row.revision += 1
        if row.state in (FailoverState.CLEANING, FailoverState.CANCELLING):
            tell |= await remove_vms(session, [row.id])
        if row.state == FailoverState.CANCELLING and row.power_off_ns:
            add_note(row, PERHAPS_OFF)
        tell |= await _drop_next(session, row)
        machine = machines.get(row.machine_id)
        if machine is not None and machine.state == State.FAILING_OVER:
            is_up = row.state == FailoverState.UP
            set_state(machine, State.FAILED_OVER if is_up else State.CANCELLING, now_ns)
    for machine in machines.values():
        release_row(machine)
        tell |= nodes_of(machine)
    if JobKind(job.kind) in _BEGINS:
        await end_run(session, job, now_ns)
    return Left(_told(failovers), _action(failovers), frozenset(tell))


def _left_as(row: Failover, *, takes_back: bool) -> FailoverState:
    state = FailoverState(row.state)
    goes = state is FailoverState.STARTING or (takes_back and state is FailoverState.UP)
    if not goes:
        return state
    is_test = row.kind == FailoverKind.TEST
    return FailoverState.CLEANING if is_test else FailoverState.CANCELLING


async def _drop_next(session: AsyncSession, row: Failover) -> set[uuid.UUID]:
    """The VM of another point goes; when it is gone, the old one runs again (`settle`)."""
    vm = await session.get(RecoveredVm, row.next_vm_id) if row.next_vm_id is not None else None
    row.next_vm_id = None
    if vm is None or vm.gone_ns is not None:
        return set()
    vm.wanted = REMOVED
    return {vm.compute_id}


async def end_run(session: AsyncSession, job: Job, now_ns: int) -> None:
    """The run has ended, and with it the actions that were under way or waited for somebody."""
    of_job = select(PlanRun.id).where(PlanRun.job_id == job.id)
    await session.execute(update(PlanRun).where(PlanRun.job_id == job.id).values(ended_ns=now_ns))
    await session.execute(
        update(PlanAction)
        .where(
            PlanAction.run_id.in_(of_job),
            PlanAction.state.in_((ActionState.RUNNING, ActionState.WAITING)),
        )
        .values(state=ActionState.CANCELLED, ended_ns=now_ns)
    )


def _told(rows: Iterable[Failover]) -> str:
    states = [f"{row.machine} is {row.state}" for row in rows]
    more = len(states) - NAMES_TOLD_MAX
    told = ", ".join(states[:NAMES_TOLD_MAX]) + (f" and {more} more" if more > 0 else "")
    return told or NOTHING_LEFT


def _action(rows: Iterable[Failover]) -> str:
    """One sentence for each state, by the first of its machines."""
    found: dict[FailoverState, str] = {}
    for row in rows:
        state = FailoverState(row.state)
        if state in _WAYS_ON:
            found.setdefault(state, f"{row.machine}: {_WAYS_ON[state].format(name=row.machine)}")
    return "; ".join(found.values()) or LOOK

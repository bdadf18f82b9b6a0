"""What a job of recovery owns: a run, and the failovers that name the job.

A failover that is not a test changes its machine, whose row then names the job as well. Rows are
locked in one order: machines, then failovers.

Source: docs/RECOVERY.md §4.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.assignments import REMOVED
from appliance.config_server.protection.jobs import JobError, JobKind, StepState, steps_of
from appliance.config_server.protection.workflow import Ports, Scene
from appliance.config_server.recovery.run import (
    FailoverKind,
    FailoverOptions,
    FailoverState,
    RunPlan,
)
from appliance.config_server.store.recovery_tables import (
    Failover,
    PlanRun,
    PointHold,
    RecoveredVm,
)
from appliance.config_server.store.schema import Job, Machine
from replication.control.recovery import HeldPoint, VmPower, VmReport
from replication.control.report import ApplierReport, ComputeReport

_SUPERSEDED = JobError(code="superseded", message="the machine is not this job's any more")


@dataclass(slots=True)
class Part:
    """One machine's part of a job.

    hold, vm:           what the failover is made from, and what it is.
    next_hold, next_vm: those of the point that it is to be changed to.
    """

    failover: Failover
    machine: Machine
    hold: PointHold | None = None
    vm: RecoveredVm | None = None
    next_hold: PointHold | None = None
    next_vm: RecoveredVm | None = None

    @property
    def kind(self) -> FailoverKind:
        return FailoverKind(self.failover.kind)

    @property
    def is_test(self) -> bool:
        return self.kind is FailoverKind.TEST

    @property
    def state(self) -> FailoverState:
        return FailoverState(self.failover.state)

    @property
    def options(self) -> FailoverOptions:
        return FailoverOptions.model_validate(self.failover.options)


@dataclass(frozen=True, slots=True)
class RecoveryScene(Scene):
    """``parts``: in the order of their groups; those that are this job's still."""

    run: PlanRun
    parts: tuple[Part, ...]

    @property
    def plan(self) -> RunPlan:
        return RunPlan.model_validate(self.run.document)

    def active(self, group: int | None = None) -> list[Part]:
        """Those that are still on their way up, of one group or of all."""
        return [
            part
            for part in self.parts
            if part.state is FailoverState.STARTING
            and (group is None or part.failover.group == group)
        ]

    def waited_ns(self) -> int:
        """How long the step under way has been so."""
        began = [step.started_ns for step in steps_of(self.job) if step.state is StepState.RUNNING]
        return self.now_ns - (began[-1] or self.now_ns) if began else 0

    async def held(self, hold: PointHold) -> HeldPoint | None:
        """What its applier says of a hold."""
        heard = await self.heard(hold.applier_id)
        if heard is None or not isinstance(heard.report, ApplierReport):
            return None
        return next((each for each in heard.report.holds if each.id == hold.id), None)

    async def vm_report(self, vm: RecoveredVm) -> VmReport | None:
        """What its compute node says of a VM."""
        heard = await self.heard(vm.compute_id)
        if heard is None or not isinstance(heard.report, ComputeReport):
            return None
        return next((each for each in heard.report.vms if each.id == vm.id), None)

    async def power(self, vms: Sequence[RecoveredVm | None], wanted: VmPower | str) -> None:
        """Write down what is wanted of VMs, and tell their compute nodes; what goes stays so."""
        changed = [vm for vm in vms if vm is not None and vm.wanted not in (wanted, REMOVED)]
        for vm in changed:
            vm.wanted = str(wanted)
        await self.tell(*{vm.compute_id for vm in changed})


async def open_run(
    session: AsyncSession, job: Job, ports: Ports, now_ns: int
) -> RecoveryScene | None:
    """The job's run with all that names the job."""
    run = await session.get(PlanRun, uuid.UUID(job.request["run"]))
    if run is None:
        return None
    own = select(Failover).where(Failover.job_id == job.id)
    ids = select(Failover.machine_id).where(Failover.job_id == job.id)
    changes = JobKind(job.kind) not in (JobKind.TEST_FAILOVER, JobKind.CLEANUP)
    query = select(Machine).where(Machine.id.in_(ids)).order_by(Machine.id)
    machines = {
        row.id: row for row in await session.scalars(query.with_for_update() if changes else query)
    }
    rows = (await session.scalars(own.order_by(Failover.id).with_for_update())).all()
    parts = []
    for row in sorted(rows, key=lambda row: (row.group, row.machine, row.id)):
        machine = machines[row.machine_id]
        if changes and machine.job_id != job.id:
            row.state, row.job_id = FailoverState.FAILED, None
            row.error, row.ended_ns = _SUPERSEDED.model_dump(), now_ns
            continue
        parts.append(Part(row, machine))
    await _complete(session, parts)
    return RecoveryScene(session, job, ports, now_ns, run, tuple(parts))


async def _complete(session: AsyncSession, parts: Sequence[Part]) -> None:
    """Add holds and VMs. A hold that no VM is made from yet is the next one."""
    ids = [part.failover.id for part in parts]
    vms = {
        vm.id: vm
        for vm in await session.scalars(select(RecoveredVm).where(RecoveredVm.failover_id.in_(ids)))
    }
    holds = (
        await session.scalars(
            select(PointHold).where(PointHold.failover_id.in_(ids)).order_by(PointHold.created_ns)
        )
    ).all()
    by_id = {hold.id: hold for hold in holds}
    used = {vm.hold_id for vm in vms.values()}
    fresh = {
        hold.failover_id: hold for hold in holds if hold.ended_ns is None and hold.id not in used
    }
    for part in parts:
        row = part.failover
        part.vm = vms.get(row.vm_id) if row.vm_id else None
        part.next_vm = vms.get(row.next_vm_id) if row.next_vm_id else None
        part.hold = by_id.get(part.vm.hold_id) if part.vm else fresh.get(row.id)
        if part.next_vm is not None:
            part.next_hold = by_id.get(part.next_vm.hold_id)
        elif part.vm is not None:
            part.next_hold = fresh.get(row.id)


async def run_nodes(session: AsyncSession, job: Job) -> frozenset[uuid.UUID]:
    """Agents, appliers and compute nodes of the job's failovers."""
    found = await session.execute(
        select(Failover.compute_id, Machine.applier_id, Machine.id)
        .join(Machine, Machine.id == Failover.machine_id)
        .where(Failover.job_id == job.id)
    )
    return frozenset(node for row in found for node in row if node is not None)

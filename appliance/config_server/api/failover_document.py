"""A failover as the API shows it."""

import uuid
from collections.abc import Sequence

from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.jobs import JobError
from appliance.config_server.protection.machines import heard_of
from appliance.config_server.recovery.decisions import rpo_seconds, rto_seconds
from appliance.config_server.recovery.run import FailoverKind, FailoverState
from appliance.config_server.server import Server
from appliance.config_server.store.recovery_tables import (
    Failover,
    PlanRun,
    RecoveredVm,
    StoredEvidence,
)
from appliance.config_server.store.schema import Node
from replication.control.recovery import EvidenceKind, VmCheck, VmReport
from replication.control.report import ComputeReport


class VmDocument(BaseModel):
    """The virtual machine of a failover.

    wanted:            disks, on, off or removed.
    state:             as its compute node says; none while that has not said anything.
    independent_share: from 0 to 1 of its disks stands alone.
    """

    id: uuid.UUID
    wanted: str
    state: str | None = None
    reason: str = ""
    guest: str = ""
    address: str = ""
    space_bytes: int = 0
    disks_seconds: float = 0.0
    independent: bool = False
    independent_share: float = 0.0
    check: VmCheck | None = None


class FailoverDocument(BaseModel):
    """A failover of one machine. Times in nanoseconds since 1970.

    run, plan:   what it is part of; the plan is empty for a machine alone.
    choice:      the point as it was asked for. point: which one it became.
    powered_off_ns: when its vCenter had switched the source off for it; 0: it did not.
    rto_seconds: from the request to the machine being up.
    rpo_seconds: from the point to the request; what was lost at most.
    notes:       of a machine alone, those of its run as well.
    has_…:       whether there is a console or a screenshot.
    """

    id: uuid.UUID
    run: uuid.UUID
    plan: str
    machine: str
    machine_id: uuid.UUID
    group: int
    kind: FailoverKind
    state: FailoverState
    job: str | None
    choice: str
    point: str
    point_ns: int
    consistency: str
    compute: str
    network: str
    asked_by: str
    asked_ns: int
    up_ns: int
    powered_off_ns: int
    ended_ns: int | None
    rto_seconds: float | None
    rpo_seconds: float | None
    notes: str
    error: JobError | None
    vm: VmDocument | None
    has_console: bool
    has_screenshot: bool


async def documents_of(
    server: Server, session: AsyncSession, rows: Sequence[Failover]
) -> list[FailoverDocument]:
    """Failovers as the API shows them."""
    vm_ids = [row.vm_id for row in rows if row.vm_id is not None]
    vms = {
        vm.id: vm
        for vm in await session.scalars(select(RecoveredVm).where(RecoveredVm.id.in_(vm_ids)))
    }
    runs = await session.scalars(
        select(PlanRun).where(PlanRun.id.in_({row.run_id for row in rows}))
    )
    nodes = await session.scalars(select(Node).where(Node.id.in_({row.compute_id for row in rows})))
    known = {run.id: run for run in runs}
    computes = {node.id: node for node in nodes}
    kept = await session.execute(
        select(StoredEvidence.vm_id, StoredEvidence.kind).where(StoredEvidence.vm_id.in_(vm_ids))
    )
    evidence = {(vm, kind) for vm, kind in kept}
    return [
        _document(
            row,
            known[row.run_id],
            computes[row.compute_id],
            _vm(server, computes[row.compute_id], vms.get(row.vm_id) if row.vm_id else None),
            evidence,
        )
        for row in rows
    ]


def _document(
    row: Failover,
    run: PlanRun,
    compute: Node,
    vm: VmDocument | None,
    evidence: set[tuple[uuid.UUID, str]],
) -> FailoverDocument:
    kinds = {kind for owner, kind in evidence if owner == row.vm_id}
    return FailoverDocument(
        id=row.id,
        run=row.run_id,
        plan=run.plan,
        machine=row.machine,
        machine_id=row.machine_id,
        group=row.group + 1,
        kind=FailoverKind(row.kind),
        state=FailoverState(row.state),
        job=row.job_id,
        choice=row.choice,
        point=row.point,
        point_ns=row.point_ns,
        consistency=row.consistency,
        compute=compute.name,
        network=row.network,
        asked_by=run.asked_by,
        asked_ns=row.asked_ns,
        up_ns=row.up_ns,
        powered_off_ns=row.powered_off_ns,
        ended_ns=row.ended_ns,
        rto_seconds=rto_seconds(row.asked_ns, row.up_ns),
        rpo_seconds=rpo_seconds(row.asked_source_ns, row.point_ns),
        notes="\n".join(filter(None, ("" if run.plan else run.notes, row.notes))),
        error=JobError.model_validate(row.error) if row.error else None,
        vm=vm,
        has_console=EvidenceKind.CONSOLE in kinds,
        has_screenshot=EvidenceKind.SCREENSHOT in kinds,
    )


def _vm(server: Server, compute: Node, vm: RecoveredVm | None) -> VmDocument | None:
    """As its compute node says now; else as it said when that mattered."""
    if vm is None:
        return None
    heard = heard_of(server.protection.ports, compute)
    said = None
    if heard is not None and isinstance(heard.report, ComputeReport):
        said = next((each for each in heard.report.vms if each.id == vm.id), None)
    if said is None and vm.report is not None:
        said = VmReport.model_validate(vm.report)
    if said is None:
        return VmDocument(id=vm.id, wanted=vm.wanted)
    told = said.model_dump(include=set(VmDocument.model_fields) - {"id", "check"})
    return VmDocument(id=vm.id, wanted=vm.wanted, check=said.check, **told)

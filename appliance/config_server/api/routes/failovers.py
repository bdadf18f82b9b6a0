"""``failovers``: test failovers and failovers, one per machine, and what is done with them.

Source: docs/RECOVERY.md §4, §8.
"""

import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import Path, Query, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Name, Router, ServerOf
from appliance.config_server.api.routes.jobs import JobDocument
from appliance.config_server.api.routes.machines import Reference
from appliance.config_server.caller import Caller
from appliance.config_server.protection.jobs import JobError
from appliance.config_server.protection.machines import find_node, heard_of, uuid_of
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.decisions import rpo_seconds, rto_seconds
from appliance.config_server.recovery.follow_up import cancel, change_point, commit
from appliance.config_server.recovery.requests import (
    NOTES_CHARACTERS_MAX,
    begin_failover,
    clean_up,
)
from appliance.config_server.recovery.run import (
    OPEN,
    FailoverKind,
    FailoverOptions,
    FailoverState,
    RunMachine,
)
from appliance.config_server.server import Server
from appliance.config_server.store.recovery_tables import (
    Failover,
    PlanRun,
    RecoveredVm,
    StoredEvidence,
)
from appliance.config_server.store.schema import Job, Node
from replication.control.recovery import EvidenceKind, PointChoice, VmCheck, VmReport
from replication.control.report import ComputeReport
from replication.control.role import OperatorRole
from replication.errors import NotFoundError

router = Router("failovers")
of_machine = Router("machines")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Operator = Annotated[Caller, needs(OperatorRole.OPERATOR)]
FailoverId = Annotated[uuid.UUID, Path()]
Point = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^/\x00]+$")]
Notes = Annotated[str, Field(max_length=NOTES_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]
MachineQuery = Annotated[str | None, Query(max_length=255, pattern=r"^[^\x00]*$")]
_TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}
_PNG_TYPE = "image/png"
_PNG: dict[int | str, dict[str, Any]] = {
    200: {"content": {_PNG_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}


class FailoverRequest(FailoverOptions):
    """kind:    test, planned (loses nothing, needs the source) or unplanned.
    point:   a choice or a point's name; of a planned one it is what was written last.
    network: of the compute node; left out: its default one, or one that is made for this test.
    compute: a compute node by name or id; left out: the emptiest.
    """

    kind: FailoverKind
    point: Point = PointChoice.LATEST.value
    network: Name | None = None
    compute: Name | None = None
    notes: Notes = ""

    def machine(self, machine: uuid.UUID) -> RunMachine:
        options = self.model_dump(include=set(FailoverOptions.model_fields))
        return RunMachine(
            id=machine, point=self.point, options=FailoverOptions.model_validate(options)
        )


class CleanUpRequest(BaseModel):
    """notes: what is to be remembered of the test."""

    model_config = ConfigDict(extra="forbid")

    notes: Notes = ""


class ChangePointRequest(BaseModel):
    """point: a choice or a point's name."""

    model_config = ConfigDict(extra="forbid")

    point: Point


class CommitRequest(BaseModel):
    """delete_points: whether the machine's recovery points go."""

    model_config = ConfigDict(extra="forbid")

    delete_points: bool = False


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
    ended_ns: int | None
    rto_seconds: float | None
    rpo_seconds: float | None
    notes: str
    error: JobError | None
    vm: VmDocument | None
    has_console: bool
    has_screenshot: bool


@of_machine.post("/{machine}/failovers", status_code=HTTPStatus.ACCEPTED)
async def fail_over(
    server: ServerOf, caller: Operator, machine: Reference, request: FailoverRequest
) -> JobDocument:
    """Start the machine at the second site: as a test, or in earnest."""
    detail = request.model_dump(mode="json", exclude={"script", "notes"})
    async with server.change(caller, "failover.begin", machine, detail) as session:
        node = await find_node(session, machine, server.clock())
        job = await begin_failover(
            asking_of(server, session, caller),
            request.kind,
            request.machine(node.id),
            network=request.network,
            compute=request.compute,
            notes=request.notes,
        )
    return await begun(server, job)


@router.get("")
async def list_failovers(
    server: ServerOf,
    paging: PagingOf,
    _: Reader,
    machine: MachineQuery = None,
    kind: FailoverKind | None = None,
    *,
    open: bool | None = None,  # noqa: A002 - the name of the query
) -> Page[FailoverDocument]:
    """List failovers, the newest first.

    machine: by name or id. open: those that have, or may have, a VM; or those that have none.
    """
    query = select(Failover)
    if machine is not None:
        named = Failover.machine == machine
        node = uuid_of(machine)
        query = query.where(named if node is None else named | (Failover.machine_id == node))
    if kind is not None:
        query = query.where(Failover.kind == kind)
    if open is not None:
        query = query.where(Failover.state.in_(OPEN) if open else Failover.state.not_in(OPEN))
    keys = [Failover.asked_ns, Failover.id]
    async with server.database.reading() as session:
        rows, following = await read_page(session, query, keys, paging, descending=True)
        items = await documents_of(server, session, rows)
    return Page(items=items, next=following)


@router.get("/{failover}")
async def read_failover(server: ServerOf, failover: FailoverId, _: Reader) -> FailoverDocument:
    """One failover with its virtual machine, checks, RTO and RPO."""
    async with server.database.reading() as session:
        row = await _find(session, failover)
        return (await documents_of(server, session, [row]))[0]


@router.post("/{failover}/cleanup", status_code=HTTPStatus.ACCEPTED)
async def clean(
    server: ServerOf, caller: Operator, failover: FailoverId, request: CleanUpRequest
) -> JobDocument:
    """Have all of a test failover go; the notes and the evidence stay."""
    async with server.change(caller, "failover.clean-up", str(failover)) as session:
        asking = asking_of(server, session, caller)
        job = await clean_up(asking, failover, notes=request.notes)
    return await begun(server, job)


@router.post("/{failover}/change-point", status_code=HTTPStatus.ACCEPTED)
async def change(
    server: ServerOf, caller: Operator, failover: FailoverId, request: ChangePointRequest
) -> JobDocument:
    """Make the virtual machine from another point; possible until commit."""
    detail = {"point": request.point}
    async with server.change(caller, "failover.change-point", str(failover), detail) as session:
        job = await change_point(asking_of(server, session, caller), failover, request.point)
    return await begun(server, job)


@router.post("/{failover}/commit", status_code=HTTPStatus.ACCEPTED)
async def commit_failover(
    server: ServerOf, caller: Operator, failover: FailoverId, request: CommitRequest
) -> JobDocument:
    """Let the virtual machine stand alone; there is no way back."""
    detail = request.model_dump()
    async with server.change(caller, "failover.commit", str(failover), detail) as session:
        asking = asking_of(server, session, caller)
        job = await commit(asking, failover, delete_points=request.delete_points)
    return await begun(server, job)


@router.post("/{failover}/cancel", status_code=HTTPStatus.ACCEPTED)
async def cancel_failover(server: ServerOf, caller: Operator, failover: FailoverId) -> JobDocument:
    """Take a failover back: the machine is protected again, without a full copy."""
    async with server.change(caller, "failover.cancel", str(failover)) as session:
        job = await cancel(asking_of(server, session, caller), failover)
    return await begun(server, job)


@router.get("/{failover}/console", response_class=Response, responses=_TEXT)
async def read_console(server: ServerOf, failover: FailoverId, _: Reader) -> PlainTextResponse:
    """The virtual machine's serial console, as far as its compute node has put it."""
    content = await _evidence(server, failover, EvidenceKind.CONSOLE)
    return PlainTextResponse(content.decode(errors="replace"))


@router.get("/{failover}/screenshot", response_class=Response, responses=_PNG)
async def read_screenshot(server: ServerOf, failover: FailoverId, _: Reader) -> Response:
    """The virtual machine's screen, as its compute node has put it last."""
    content = await _evidence(server, failover, EvidenceKind.SCREENSHOT)
    return Response(content, media_type=_PNG_TYPE, headers={"x-content-type-options": "nosniff"})


def asking_of(server: Server, session: AsyncSession, caller: Caller) -> Asking:
    """Who asks, in the transaction of a change."""
    return Asking(session, server.protection.ports, server.clock(), caller.name)


async def begun(server: Server, job: Job) -> JobDocument:
    """The job is written; whether it can be started at once or by the next sweep is all one."""
    await server.protection.begin(job.id)
    return JobDocument.of(job)


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


async def _find(session: AsyncSession, failover: uuid.UUID) -> Failover:
    row = await session.get(Failover, failover)
    if row is None:
        raise NotFoundError(
            f"there is no failover {failover}", hint="`understudy failover list` lists them"
        )
    return row


async def _evidence(server: Server, failover: uuid.UUID, kind: EvidenceKind) -> bytes:
    async with server.database.reading() as session:
        row = await _find(session, failover)
        stored = await session.get(StoredEvidence, (row.vm_id, kind)) if row.vm_id else None
    if stored is None:
        raise NotFoundError(
            f"there is no {kind} of this failover of {row.machine}",
            hint="the compute node puts it when its check has ended",
        )
    return stored.content

"""``drills``: test failovers as evidence, with their reports."""

import uuid
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Self

from fastapi import Response
from pydantic import BaseModel, Field, model_validator
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Name, Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.protection.jobs import StepRecord, steps_of
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.drills.holding import (
    OPEN,
    DrillState,
    begin_drill,
    find_drill,
    machine_of,
)
from appliance.config_server.recovery.drills.report import is_untouched
from appliance.config_server.recovery.plans.running import RunRequest
from appliance.config_server.recovery.requests import NOTES_CHARACTERS_MAX
from appliance.config_server.recovery.run import FailoverOptions
from appliance.config_server.store.recovery_tables import DrillReport, PlanRun
from appliance.config_server.store.schema import Job
from replication.control.role import OperatorRole
from replication.errors import ConflictError

router = Router("drills")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Operator = Annotated[Caller, needs(OperatorRole.OPERATOR)]
PointText = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
NoteText = Annotated[str, Field(max_length=NOTES_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]
MachineText = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
_HTML: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}}
}
_PAGE_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class DrillRequest(FailoverOptions):
    """A drill of a plan or of a machine, one of them. How VMs are made, a plan says itself."""

    plan: Name | None = None
    machine: MachineText | None = None
    point: PointText = "latest"
    network: Name | None = None
    compute: Name | None = None
    notes: NoteText = ""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.plan is None) == (self.machine is None):
            raise ValueError("a drill is of a plan or of a machine, one of them")
        given = self.model_fields_set & (set(FailoverOptions.model_fields) - {"wait_seconds"})
        if self.plan is not None and given:
            raise ValueError(f"a plan says itself how its VMs are made: {', '.join(sorted(given))}")
        return self

    def request(self) -> RunRequest:
        names = ("point", "network", "compute", "wait_seconds", "notes")
        options = self.model_dump(include=set(FailoverOptions.model_fields))
        return RunRequest(
            **{name: getattr(self, name) for name in names},
            options=FailoverOptions.model_validate(options),
        )


class DrillSummary(BaseModel):
    """A drill in a list. ``target``: the plan or the machine. ``job``: that runs it."""

    id: uuid.UUID
    target: str
    state: DrillState
    schedule: str
    asked_by: str
    began_ns: int
    ended_ns: int | None
    rto_seconds: float | None
    reason: str
    job: str


class DrillAnswer(DrillSummary):
    """A drill, whole.

    report:    the evidence, when it is complete. untouched: it is what its digest is of.
    steps:     of the job that runs it, and of the one that cleans up.
    """

    report: dict[str, Any] | None
    untouched: bool
    steps: list[StepRecord]


@router.get("")
async def list_drills(server: ServerOf, paging: PagingOf, _: Reader) -> Page[DrillSummary]:
    """List the drills, the newest first."""
    async with server.database.reading() as session:
        rows, following = await read_page(
            session,
            select(DrillReport).options(defer(DrillReport.document), defer(DrillReport.page)),
            [DrillReport.began_ns, DrillReport.id],
            paging,
            descending=True,
        )
        jobs = await _jobs(session, rows)
        outcomes = await _outcomes(session, rows)
    items = [_summary(row, jobs.get(row.id, ""), outcomes.get(row.id, {})) for row in rows]
    return Page(items=items, next=following)


@router.get("/{drill}")
async def read_drill(server: ServerOf, drill: uuid.UUID, _: Reader) -> DrillAnswer:
    """One drill with its report."""
    async with server.database.reading() as session:
        row = await find_drill(session, drill)
        job = (await _jobs(session, [row])).get(row.id, "")
        cleanup = row.document.get("cleanup") if row.state == DrillState.CLEANING else None
        steps: list[StepRecord] = []
        for each in (job, cleanup):
            found = await session.get(Job, each) if isinstance(each, str) and each else None
            steps += steps_of(found) if found is not None else []
    report = row.document if row.state not in OPEN else None
    return DrillAnswer(
        **_summary(row, job, report or {}).model_dump(),
        report=report,
        untouched=report is not None and is_untouched(report),
        steps=steps,
    )


@router.get("/{drill}/report.html", response_class=Response, responses=_HTML)
async def read_page_of_drill(server: ServerOf, drill: uuid.UUID, _: Reader) -> Response:
    """The report as a page for people, which needs nothing else. 409 while the drill is on."""
    async with server.database.reading() as session:
        row = await find_drill(session, drill)
    if row.state in OPEN:
        raise ConflictError(f"the drill of {row.target} is {row.state}", hint="wait for its end")
    return Response(
        row.page,
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": _PAGE_POLICY},
    )


@router.post("", status_code=HTTPStatus.ACCEPTED)
async def hold(server: ServerOf, caller: Operator, request: DrillRequest) -> DrillSummary:
    """Hold a drill now: a test failover that is cleaned up by itself, and its report."""
    detail = request.model_dump(mode="json", exclude={"notes", "script"})
    target = request.plan or request.machine or ""
    async with server.change(caller, "drill.begin", target, detail) as session:
        asking = Asking(session, server.protection.ports, server.clock(), caller.name)
        machine = None
        if request.machine is not None:
            machine = (await machine_of(session, request.machine, server.clock())).id
        row, job = await begin_drill(
            asking,
            server.config.recovery,
            request.request(),
            plan=request.plan or "",
            machine=machine,
        )
    await server.protection.begin(job.id)
    return _summary(row, job.id, {})


async def _jobs(session: AsyncSession, rows: Sequence[DrillReport]) -> dict[uuid.UUID, str]:
    found = await session.execute(
        select(PlanRun.drill_id, PlanRun.job_id).where(
            PlanRun.drill_id.in_([row.id for row in rows])
        )
    )
    return {drill: job for drill, job in found if drill is not None}


async def _outcomes(
    session: AsyncSession, rows: Sequence[DrillReport]
) -> dict[uuid.UUID, Mapping[str, Any]]:
    """What a list tells of reports, which hold screenshots and may be large."""
    document = DrillReport.document
    found = await session.execute(
        select(
            DrillReport.id, document["rto_seconds"].as_float(), document["reason"].as_string()
        ).where(DrillReport.id.in_([row.id for row in rows if row.state not in OPEN]))
    )
    return {drill: {"rto_seconds": rto, "reason": reason or ""} for drill, rto, reason in found}


def _summary(row: DrillReport, job: str, report: Mapping[str, Any]) -> DrillSummary:
    return DrillSummary(
        id=row.id,
        target=row.target,
        state=DrillState(row.state),
        schedule=row.schedule,
        asked_by=row.asked_by,
        began_ns=row.began_ns,
        ended_ns=row.ended_ns,
        rto_seconds=report.get("rto_seconds"),
        reason=report.get("reason", ""),
        job=job,
    )

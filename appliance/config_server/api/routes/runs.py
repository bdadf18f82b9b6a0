"""``runs``: plans, and machines alone, as they are or were recovered."""

import uuid
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.access import needs
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.api.routes.jobs import JobDocument
from appliance.config_server.caller import Caller
from appliance.config_server.protection.jobs import JobError, JobState
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.decisions import rpo_seconds, rto_seconds
from appliance.config_server.recovery.requests import NOTES_CHARACTERS_MAX, clean_up_run
from appliance.config_server.recovery.run import (
    OPEN,
    ActionKind,
    ActionPlace,
    ActionState,
    FailoverKind,
    FailoverState,
)
from appliance.config_server.store.recovery_tables import Failover, PlanAction, PlanRun
from appliance.config_server.store.schema import Job
from replication.control.role import OperatorRole
from replication.errors import NotFoundError

router = Router("runs")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Operator = Annotated[Caller, needs(OperatorRole.OPERATOR)]
NoteText = Annotated[str, Field(max_length=NOTES_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]


class RunSummary(BaseModel):
    """A run in a list.

    plan:  its name, empty for a machine alone. state: of its job.
    open:  there are, or may be, VMs of it.
    drill: the drill that it is part of.
    """

    id: uuid.UUID
    plan: str
    kind: FailoverKind
    state: JobState
    job: str
    open: bool
    machine_count: int
    up_count: int
    asked_by: str
    asked_ns: int
    ended_ns: int | None
    notes: str
    drill: uuid.UUID | None


class RunFailover(BaseModel):
    """One machine's part of a run. ``group`` counts from 1."""

    id: uuid.UUID
    machine: str
    group: int
    state: FailoverState
    point: str
    point_ns: int
    consistency: str
    rto_seconds: float | None
    rpo_seconds: float | None
    error: JobError | None


class RunActionDocument(BaseModel):
    """An action that has had its turn. ``output``: the end of what it wrote."""

    group: int
    place: ActionPlace
    name: str
    kind: ActionKind
    state: ActionState
    attempt: int
    began_ns: int
    ended_ns: int | None
    exit_code: int | None
    detail: str
    output: str
    resumed_by: str
    note: str


class RunDocument(RunSummary):
    """A run, whole."""

    failovers: list[RunFailover]
    actions: list[RunActionDocument]


class NotesRequest(BaseModel):
    """What people say of it."""

    model_config = ConfigDict(extra="forbid")

    notes: NoteText = ""


async def summaries(session: AsyncSession, rows: Sequence[PlanRun]) -> list[RunSummary]:
    """Runs as they are listed."""
    ids = [row.id for row in rows]
    states: dict[uuid.UUID, dict[str, int]] = {}
    for run, state, count in await session.execute(
        select(Failover.run_id, Failover.state, func.count())
        .where(Failover.run_id.in_(ids))
        .group_by(Failover.run_id, Failover.state)
    ):
        states.setdefault(run, {})[state] = count
    found = await session.execute(
        select(Job.id, Job.state).where(Job.id.in_([row.job_id for row in rows]))
    )
    jobs = {job: state for job, state in found}  # noqa: C416 - rows are no pairs to mypy
    return [
        _summary(row, states.get(row.id, {}), JobState(jobs.get(row.job_id, JobState.FAILED)))
        for row in rows
    ]


def _summary(row: PlanRun, states: dict[str, int], job: JobState) -> RunSummary:
    up = (FailoverState.UP, FailoverState.COMMITTED)
    return RunSummary(
        id=row.id,
        plan=row.plan,
        kind=FailoverKind(row.kind),
        state=job,
        job=row.job_id,
        open=any(state in OPEN for state in states),
        machine_count=sum(states.values()),
        up_count=sum(states.get(state, 0) for state in up),
        asked_by=row.asked_by,
        asked_ns=row.asked_ns,
        ended_ns=row.ended_ns,
        notes=row.notes,
        drill=row.drill_id,
    )


@router.get("/{run}")
async def read_run(server: ServerOf, run: uuid.UUID, _: Reader) -> RunDocument:
    """One run with its machines and actions."""
    async with server.database.reading() as session:
        row = await session.get(PlanRun, run)
        if row is None:
            raise NotFoundError(f"there is no run {run}", hint="`understudy plans runs PLAN`")
        (summary,) = await summaries(session, [row])
        failovers = await session.scalars(
            select(Failover)
            .where(Failover.run_id == run)
            .order_by(Failover.group, Failover.machine)
        )
        actions = await session.scalars(
            select(PlanAction)
            .where(PlanAction.run_id == run)
            .order_by(PlanAction.group, PlanAction.place.desc(), PlanAction.index)
        )
        return RunDocument(
            **summary.model_dump(),
            failovers=[_failover(each) for each in failovers],
            actions=[_action(each) for each in actions],
        )


@router.post("/{run}/cleanup", status_code=HTTPStatus.ACCEPTED)
async def cleanup(
    server: ServerOf, caller: Operator, run: uuid.UUID, request: NotesRequest
) -> JobDocument:
    """Have all that a test has made go; the notes stay."""
    async with server.change(caller, "run.cleanup", str(run)) as session:
        asking = Asking(session, server.protection.ports, server.clock(), caller.name)
        job = await clean_up_run(asking, run, notes=request.notes)
    await server.protection.begin(job.id)
    return JobDocument.of(job)


def _failover(row: Failover) -> RunFailover:
    return RunFailover(
        id=row.id,
        machine=row.machine,
        group=row.group + 1,
        state=FailoverState(row.state),
        point=row.point,
        point_ns=row.point_ns,
        consistency=row.consistency,
        rto_seconds=rto_seconds(row.asked_ns, row.up_ns),
        rpo_seconds=rpo_seconds(row.asked_source_ns, row.point_ns),
        error=JobError.model_validate(row.error) if row.error else None,
    )


def _action(row: PlanAction) -> RunActionDocument:
    return RunActionDocument(
        group=row.group + 1,
        place=ActionPlace(row.place),
        name=row.name,
        kind=ActionKind(row.kind),
        state=ActionState(row.state),
        attempt=row.attempt,
        began_ns=row.began_ns,
        ended_ns=row.ended_ns,
        exit_code=row.exit_code,
        detail=row.detail,
        output=row.output,
        resumed_by=row.resumed_by,
        note=row.note,
    )

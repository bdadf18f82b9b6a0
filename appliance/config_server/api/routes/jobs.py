"""``jobs``: what is being done to machines, step by step, and what came of it."""

import uuid
from http import HTTPStatus
from typing import Annotated

from fastapi import Path, Query
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.protection.jobs import (
    JobError,
    JobKind,
    JobState,
    StepRecord,
    ask_to_cancel,
    find_job,
    steps_of,
)
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.requests import NOTES_CHARACTERS_MAX, resume
from appliance.config_server.store.schema import Job
from replication.control.role import OperatorRole

router = Router("jobs")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Operator = Annotated[Caller, needs(OperatorRole.OPERATOR)]
JobId = Annotated[str, Path(min_length=1, max_length=255, pattern=r"^[^/\x00]+$")]
MachineQuery = Annotated[str | None, Query(max_length=255)]


class JobDocument(BaseModel):
    """A job. Times in nanoseconds since 1970.

    target:   the machine's or the plan's name. run: the run that a job of recovery belongs to.
    instance: the config server that works on it.
    """

    id: str
    kind: JobKind
    target: str
    state: JobState
    steps: list[StepRecord]
    error: JobError | None
    cancel_asked: bool
    asked_by: str
    instance: str
    created_ns: int
    updated_ns: int
    ended_ns: int | None
    run: uuid.UUID | None = None

    @classmethod
    def of(cls, job: Job) -> "JobDocument":
        return cls(
            id=job.id,
            kind=JobKind(job.kind),
            target=job.target,
            state=JobState(job.state),
            steps=steps_of(job),
            error=JobError.model_validate(job.error) if job.error else None,
            cancel_asked=job.cancel_asked,
            asked_by=job.asked_by,
            instance=job.instance,
            created_ns=job.created_ns,
            updated_ns=job.updated_ns,
            ended_ns=job.ended_ns,
            run=job.request.get("run"),
        )


class ResumeRequest(BaseModel):
    """note: what was done, or found."""

    model_config = ConfigDict(extra="forbid")

    note: Annotated[str, Field(max_length=NOTES_CHARACTERS_MAX, pattern=r"^[^\x00]*$")] = ""


@router.get("")
async def list_jobs(
    server: ServerOf,
    paging: PagingOf,
    _: Reader,
    state: JobState | None = None,
    machine: MachineQuery = None,
) -> Page[JobDocument]:
    """List the jobs, the newest first. ``machine``: those of one, by its name."""
    query = select(Job)
    if state is not None:
        query = query.where(Job.state == state)
    if machine is not None:
        query = query.where(Job.target == machine)
    async with server.database.reading() as session:
        rows, following = await read_page(session, query, [Job.id], paging, descending=True)
    return Page(items=[JobDocument.of(row) for row in rows], next=following)


@router.get("/{job}")
async def read_job(server: ServerOf, job: JobId, _: Reader) -> JobDocument:
    """One job with its steps."""
    async with server.database.reading() as session:
        return JobDocument.of(await find_job(session, job))


@router.post("/{job}/cancel", status_code=HTTPStatus.ACCEPTED)
async def cancel(server: ServerOf, caller: Operator, job: JobId) -> JobDocument:
    """Ask a job to stop. It undoes what it has begun, then it is cancelled."""
    async with server.change(caller, "job.cancel", job) as session:
        row = await find_job(session, job, lock=True)
        ask_to_cancel(row, server.clock())
    server.protection.performer.wake(row.id)
    return JobDocument.of(row)


@router.post("/{job}/resume", status_code=HTTPStatus.ACCEPTED)
async def resume_job(
    server: ServerOf, caller: Operator, job: JobId, request: ResumeRequest
) -> JobDocument:
    """Say that what a job waits for is done: it goes on after a manual action."""
    async with server.change(caller, "job.resume", job, {"note": request.note}) as session:
        asking = Asking(session, server.protection.ports, server.clock(), caller.name)
        row = await resume(asking, job, note=request.note)
    server.protection.performer.wake(row.id)
    return JobDocument.of(row)

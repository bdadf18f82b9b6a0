"""Jobs as rows: what people see of a durable workflow, and what makes each step happen once.

A step's end is written in the transaction that does the step. So a workflow that is run again,
after a crash or by another config server, finds what is done and passes over it.

Source: docs/CONTROL.md §9.
"""

import secrets
import uuid
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.store.schema import Job
from replication.errors import ConflictError, NotFoundError, ReplicationError

ID_BYTES = 8
NOT_UNDONE = "not_undone"
"""The code of a job's error when what it had begun could not be undone."""


class JobState(StrEnum):
    """QUEUED: written, no step has begun."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


OPEN = (JobState.QUEUED, JobState.RUNNING)


class JobKind(StrEnum):
    """What jobs there are."""

    PROTECT = "protect"
    UNPROTECT = "unprotect"
    ADD_DISK = "add-disk"
    EXCLUDE_DISK = "exclude-disk"
    RESYNC = "resync"
    TEST_FAILOVER = "test-failover"
    FAILOVER = "failover"
    CLEANUP = "cleanup"
    COMMIT = "commit"
    CANCEL_FAILOVER = "cancel-failover"
    CHANGE_POINT = "change-point"


class StepState(StrEnum):
    """SKIPPED: the job ended before it."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    SKIPPED = "skipped"


class StepRecord(BaseModel):
    """A step as it is kept in the job's row. ``note``: what it waits for, or what came of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    state: StepState = StepState.PENDING
    note: str = ""
    started_ns: int | None = None
    ended_ns: int | None = None


class JobError(BaseModel):
    """Why a job failed, in the shape of the API's errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    message: str
    hint: str = ""

    @classmethod
    def of(cls, error: ReplicationError) -> "JobError":
        return cls(code=error.code, message=str(error.args[0]), hint=error.hint or "")


def new_job(
    session: AsyncSession,
    kind: JobKind,
    *,
    target_id: uuid.UUID | None,
    target: str,
    steps: tuple[str, ...],
    request: dict[str, Any],
    asked_by: str,
    now_ns: int,
) -> Job:
    """Add a job to the transaction. Its id sorts by time."""
    job = Job(
        id=f"{now_ns // 1_000_000:012x}{secrets.token_hex(ID_BYTES)}",
        kind=kind,
        target_id=target_id,
        target=target,
        state=JobState.QUEUED,
        request=request,
        steps=[StepRecord(name=name).model_dump() for name in steps],
        asked_by=asked_by,
        created_ns=now_ns,
        updated_ns=now_ns,
    )
    session.add(job)
    return job


async def find_job(session: AsyncSession, job_id: str, *, lock: bool = False) -> Job:
    """Raises NotFoundError. ``lock``: nobody else works on it until the transaction's end."""
    query = select(Job).where(Job.id == job_id)
    job = await session.scalar(query.with_for_update() if lock else query)
    if job is None:
        raise NotFoundError(f"there is no job {job_id}", hint="`understudy jobs` lists them")
    return job


def steps_of(job: Job) -> list[StepRecord]:
    return [StepRecord.model_validate(step) for step in job.steps]


def is_open(job: Job) -> bool:
    return job.state in OPEN


def mark_step(job: Job, index: int, now_ns: int, **changes: Any) -> None:
    """Replace parts of a step's record."""
    steps = list(job.steps)
    record = StepRecord.model_validate({**steps[index], **changes})
    steps[index] = record.model_dump()
    job.steps = steps
    job.updated_ns = now_ns


def ask_to_cancel(job: Job, now_ns: int) -> None:
    """The workflow sees it at its next step or poll. Raises ConflictError for an ended job."""
    if not is_open(job):
        raise ConflictError(f"job {job.id} has ended: it {_ENDED[JobState(job.state)]}")
    job.cancel_asked = True
    job.updated_ns = now_ns


def fail(job: Job, error: JobError, now_ns: int) -> None:
    """Note why it fails; `close` ends it."""
    job.error = error.model_dump()
    job.updated_ns = now_ns


def close(job: Job, state: JobState, now_ns: int) -> None:
    """End it; steps that have not begun are passed over, and those that cannot be read are gone."""
    try:
        steps = steps_of(job)
    except ValidationError:
        job.steps = steps = []
    for index, step in enumerate(steps):
        if step.state is StepState.PENDING:
            mark_step(job, index, now_ns, state=StepState.SKIPPED)
        elif step.state is StepState.RUNNING:
            mark_step(job, index, now_ns, state=StepState.FAILED, ended_ns=now_ns)
    job.state = state
    job.ended_ns = now_ns
    job.updated_ns = now_ns


_ENDED = {
    JobState.SUCCEEDED: "succeeded",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "was cancelled",
}

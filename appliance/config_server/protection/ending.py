"""The end of a job: what succeeded is kept, what was begun otherwise is undone.

Whoever killed the config server in between finds it ended later on. An end that fails is tried
again, a bounded number of times: then what the job owns is let go of as it is, and its error says
what is left to a person.

Source: docs/CONTROL.md §9.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable

import structlog
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.jobs import (
    NOT_UNDONE,
    JobError,
    JobKind,
    JobState,
    StepState,
    close,
    fail,
    find_job,
    is_open,
    mark_step,
    steps_of,
)
from appliance.config_server.protection.patience import is_the_database_s, patiently
from appliance.config_server.protection.workflow import Left, Ports, Workflows
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Job
from replication.errors import ReplicationError

ENDING_TRIES_MAX = 8
ENDING_RETRY_SECONDS = 1.0
ENDING_RETRY_SECONDS_MAX = 60.0
"""Between two tries to end a job: twice as long each time, two minutes in all."""

CAUSE_CHARACTERS_MAX = 300

DEFECT = JobError(
    code="defect",
    message="a defect of the config server ended the job",
    hint="its log says why; tell its maintainers",
)


class JobEnd:
    """Ends jobs in the database."""

    def __init__(
        self, database: Database, ports: Ports, workflows: Workflows, clock: Callable[[], int]
    ) -> None:
        self._database = database
        self._ports = ports
        self._workflows = workflows
        self._clock = clock

    async def conclude(self, job_id: str) -> None:
        """Close the job: what succeeded is kept, what was begun otherwise is undone.

        An end that fails is tried again ENDING_TRIES_MAX times. A job whose steps are all done then
        ends as one that failed; where that cannot be done either, what it owns is let go of as it
        is, and its error says what is left to a person.
        """
        error = await self._try_to_close(job_id)
        if error is not None:
            disowning = functools.partial(self._disown, job_id, error)
            if await patiently(job_id, disowning):
                error = await self._try_to_close(job_id)
        if error is not None:
            await patiently(job_id, functools.partial(self._abandon, job_id, error))

    async def _try_to_close(self, job_id: str) -> Exception | None:
        """What it failed with each time; none when the job is closed."""

        async def close_it() -> None:
            async with self._database.writing() as session:
                job = await find_job(session, job_id, lock=True)
                if is_open(job):
                    await self._close(session, job)

        wait_seconds = ENDING_RETRY_SECONDS
        for tried in range(1, ENDING_TRIES_MAX + 1):
            try:
                await patiently(job_id, close_it)
            except Exception as error:
                if is_the_database_s(error):
                    raise
                structlog.get_logger().exception("a job cannot end", job=job_id, tried=tried)
                if tried == ENDING_TRIES_MAX:
                    return error
                with contextlib.suppress(Exception):  # it is for people alone
                    await self._note(job_id, f"cannot end, tried {tried} times: {_cause(error)}")
            else:
                return None
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, ENDING_RETRY_SECONDS_MAX)
        raise AssertionError

    async def _note(self, job_id: str, note: str) -> None:
        """With the last step that has begun."""
        async with self._database.writing() as session:
            job = await find_job(session, job_id, lock=True)
            begun = [index for index, step in enumerate(steps_of(job)) if step.started_ns]
            if begun and is_open(job):
                mark_step(job, begun[-1], self._clock(), note=note)

    async def _disown(self, job_id: str, error: Exception) -> bool:
        """Whether it was to succeed, and now has failed: what it did is undone as of any other."""
        async with self._database.writing() as session:
            job = await find_job(session, job_id, lock=True)
            if not is_open(job) or job.error is not None or not _all_done(job):
                return False
            fail(job, _unended(job, error), self._clock())
            return True

    async def _abandon(self, job_id: str, error: Exception) -> None:
        async with self._database.writing() as session:
            job = await find_job(session, job_id, lock=True)
            if not is_open(job):
                return
            now_ns = self._clock()
            left = await self._workflows[JobKind(job.kind)].abandon(session, job, now_ns)
            fail(job, _not_undone(job, error, left), now_ns)
            close(job, JobState.FAILED, now_ns)
            try:
                async with session.begin_nested():
                    await self._ports.bump(session, sorted(left.tell))
            except Exception:  # noqa: BLE001 - they are told along with the next thing that changes
                structlog.get_logger().exception("nodes cannot be told", job=job_id)
        structlog.get_logger().error("a job was abandoned", job=job_id, left=left.told)

    async def _close(self, session: AsyncSession, job: Job) -> None:
        now_ns = self._clock()
        succeeded = job.error is None and _all_done(job)
        workflow = self._workflows[JobKind(job.kind)]
        scene = await workflow.open(session, job, self._ports, now_ns)
        if scene is not None and succeeded:
            partly = await workflow.succeed(scene)
            if partly is not None:
                fail(job, partly, now_ns)
                close(job, JobState.FAILED, now_ns)
                return
        elif scene is not None:
            await workflow.undo(scene)
        if succeeded:
            close(job, JobState.SUCCEEDED, now_ns)
        elif job.error is not None:
            close(job, JobState.FAILED, now_ns)
        elif job.cancel_asked:
            close(job, JobState.CANCELLED, now_ns)
        else:
            fail(job, DEFECT, now_ns)
            close(job, JobState.FAILED, now_ns)


def _all_done(job: Job) -> bool:
    """Steps that cannot be read are not."""
    try:
        return all(step.state is StepState.DONE for step in steps_of(job))
    except ValidationError:
        return False


def _unended(job: Job, error: Exception) -> JobError:
    return JobError(
        code="defect",
        message=f"all steps are done, but the {job.kind} could not be ended: {_cause(error)}",
        hint=DEFECT.hint,
    )


def _not_undone(job: Job, error: Exception, left: Left) -> JobError:
    """Why the job failed, what could not be undone, and what a person is to do."""
    before = f"{JobError.model_validate(job.error).message}; " if job.error else ""
    return JobError(
        code=NOT_UNDONE,
        message=f"{before}what the {job.kind} had begun could not be undone: {_cause(error)}; "
        f"left as it is: {left.told}",
        hint=left.action,
    )


def _cause(error: Exception) -> str:
    told = error.args[0] if isinstance(error, ReplicationError) else repr(error)
    return str(told)[:CAUSE_CHARACTERS_MAX]

"""Doing a job's steps: each in one transaction with its record, while the machine names the job.

Knows nothing of what runs it again after a crash (`durable`): whoever calls these functions, as
often as it likes, brings a job to the same end.

Source: docs/CONTROL.md §9.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Literal, TypeVar

import structlog
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.jobs import (
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
from appliance.config_server.protection.workflow import (
    Done,
    Ports,
    Scene,
    Step,
    StepFailedError,
    Verdict,
)
from appliance.config_server.protection.workflows import WORKFLOWS
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Job, Machine
from replication.errors import ReplicationError

POLL_SECONDS = 5.0
"""Between two looks of a step that waits, for what another config server hears. What this one hears
wakes it at once.
"""

DATABASE_RETRY_SECONDS = 1.0
DATABASE_RETRIES_MAX = 3600
"""A job outlives a database that is away for an hour; then the sweep takes it up again."""

Ending = Literal["go on", "end"]
T = TypeVar("T")


class Performer:
    """Does the steps of jobs against a database.

    boundary: called between any two things that are durable by themselves; tests kill there.
    """

    def __init__(
        self,
        database: Database,
        ports: Ports,
        clock: Callable[[], int],
        *,
        instance: str,
        answer_seconds_max: float,
        boundary: Callable[[str], None] | None = None,
    ) -> None:
        self._database = database
        self._ports = ports
        self._clock = clock
        self._instance = instance
        self._answer_ns = int(answer_seconds_max * 1e9)
        self._boundary = boundary or (lambda _: None)
        self._waiting: dict[uuid.UUID, set[asyncio.Event]] = {}

    def wake(self, node: uuid.UUID) -> None:
        """There is news of a node: the steps that wait for it look again."""
        for news in self._waiting.get(node, ()):
            news.set()

    async def names(self, job_id: str) -> list[str]:
        """The steps that the job was made with, whatever this version would make."""

        async def read() -> list[str]:
            async with self._database.reading() as session:
                return [step.name for step in steps_of(await find_job(session, job_id))]

        return await self._patiently(job_id, read)

    async def perform(self, job_id: str, index: int) -> Ending:
        """Do a step, or wait for what it waits for. Says whether the next one is to be done."""
        self._boundary(f"before {index}")
        ending = await self._patiently(job_id, lambda: self._attempt(job_id, index))
        if ending is None:
            with self._listening(await self._nodes_of(job_id)) as news:
                while ending is None:
                    news.clear()
                    ending = await self._patiently(job_id, lambda: self._attempt(job_id, index))
                    if ending is None:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(news.wait(), POLL_SECONDS)
        self._boundary(f"after {index}")
        return ending

    @contextlib.contextmanager
    def _listening(self, nodes: frozenset[uuid.UUID]) -> Iterator[asyncio.Event]:
        news = asyncio.Event()
        for node in nodes:
            self._waiting.setdefault(node, set()).add(news)
        try:
            yield news
        finally:
            for node in nodes:
                self._waiting[node].discard(news)
                if not self._waiting[node]:
                    del self._waiting[node]

    async def _nodes_of(self, job_id: str) -> frozenset[uuid.UUID]:
        """The nodes whose news the job may wait for."""

        async def read() -> frozenset[uuid.UUID]:
            async with self._database.reading() as session:
                job = await find_job(session, job_id)
                machine = await session.get(Machine, job.target_id)
            if machine is None:
                return frozenset()
            known = (machine.id, machine.process_server_id, machine.applier_id)
            return frozenset(node for node in known if node is not None)

        return await self._patiently(job_id, read)

    async def conclude(self, job_id: str) -> None:
        """Close the job: what succeeded is kept, what was begun otherwise is undone."""
        self._boundary("before the end")

        async def close_it() -> None:
            async with self._database.writing() as session:
                job = await find_job(session, job_id, lock=True)
                if is_open(job):
                    await self._close(session, job)

        await self._patiently(job_id, close_it)
        self._boundary("after the end")

    async def _attempt(self, job_id: str, index: int) -> Ending | None:
        """One transaction; None: wait."""
        async with self._database.writing() as session:
            job = await find_job(session, job_id, lock=True)
            record = steps_of(job)[index]
            if not is_open(job) or job.error is not None:
                return "end"
            if record.state is StepState.DONE:
                return "go on"
            now_ns = self._clock()
            if job.cancel_asked:
                return "end"
            machine = await _machine_of(session, job)
            if machine is None:
                fail(job, _LOST, now_ns)
                return "end"
            if record.started_ns is None:
                job.state = JobState.RUNNING
                job.instance = self._instance
                mark_step(job, index, now_ns, state=StepState.RUNNING, started_ns=now_ns)
            scene = Scene(session, job, machine, self._ports, now_ns)
            began_ns = record.started_ns or now_ns
            verdict: Verdict | ReplicationError
            try:
                step = WORKFLOWS[JobKind(job.kind)].step(record.name)
                verdict = await step.act(scene)
                if not isinstance(verdict, Done) and now_ns - began_ns > self._answer_ns:
                    verdict = self._late(step)
            except ReplicationError as error:
                if error.retryable:
                    raise
                verdict = error
            return self._settle(job, index, verdict, now_ns)

    def _settle(
        self, job: Job, index: int, verdict: Verdict | ReplicationError, now_ns: int
    ) -> Ending | None:
        if isinstance(verdict, ReplicationError):
            fail(job, JobError.of(verdict), now_ns)
            mark_step(job, index, now_ns, state=StepState.FAILED, ended_ns=now_ns)
            return "end"
        if isinstance(verdict, Done):
            mark_step(job, index, now_ns, state=StepState.DONE, note=verdict.note, ended_ns=now_ns)
            return "go on"
        if steps_of(job)[index].note != verdict.note:
            mark_step(job, index, now_ns, note=verdict.note)
        return None

    def _late(self, step: Step) -> Verdict:
        within = f"within {_duration(self._answer_ns)}"
        if not step.late:
            return Done(f"nobody answered {within}; gone on without")
        raise StepFailedError(f"{step.late} {within}", code="no_answer", hint=step.hint or None)

    async def _close(self, session: AsyncSession, job: Job) -> None:
        now_ns = self._clock()
        succeeded = all(step.state is StepState.DONE for step in steps_of(job))
        machine = await _machine_of(session, job)
        if machine is not None:
            workflow = WORKFLOWS[JobKind(job.kind)]
            scene = Scene(session, job, machine, self._ports, now_ns)
            await (workflow.succeed if succeeded else workflow.undo)(scene)
            machine.job_id = None
            machine.revision += 1
        if succeeded:
            close(job, JobState.SUCCEEDED, now_ns)
        elif job.error is not None:
            close(job, JobState.FAILED, now_ns)
        elif job.cancel_asked:
            close(job, JobState.CANCELLED, now_ns)
        else:
            fail(job, _DEFECT, now_ns)
            close(job, JobState.FAILED, now_ns)

    async def _patiently(self, job_id: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """The database may be away for a while."""
        for _ in range(DATABASE_RETRIES_MAX):
            try:
                return await attempt()
            except ReplicationError as error:
                if not error.retryable:
                    raise
                structlog.get_logger().warning("a job waits", job=job_id, reason=str(error))
            await asyncio.sleep(DATABASE_RETRY_SECONDS)
        return await attempt()


_LOST = JobError(
    code="superseded", message="the machine is not this job's any more; nothing was changed"
)
_DEFECT = JobError(
    code="defect",
    message="a defect of the config server ended the job",
    hint="its log says why; tell its maintainers",
)


async def _machine_of(session: AsyncSession, job: Job) -> Machine | None:
    """The job's machine, locked, while it names the job."""
    if job.target_id is None:
        return None
    machine = await session.scalar(
        select(Machine).where(Machine.id == job.target_id).with_for_update()
    )
    return machine if machine is not None and machine.job_id == job.id else None


def _duration(nanoseconds: int) -> str:
    seconds = nanoseconds / 1e9
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"

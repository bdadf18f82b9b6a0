"""Doing a job's steps: each in one transaction with its record, while what it owns names the job.

Knows nothing of what runs it again after a crash (`durable`): whoever calls these functions, as
often as it likes, brings a job to the same end.

Source: docs/CONTROL.md §9.
"""

import asyncio
import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import structlog
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.ending import DEFECT, JobEnd
from appliance.config_server.protection.jobs import (
    JobError,
    JobKind,
    JobState,
    StepState,
    fail,
    find_job,
    is_open,
    mark_step,
    steps_of,
)
from appliance.config_server.protection.patience import is_the_database_s, patiently
from appliance.config_server.protection.workflow import (
    Done,
    Outside,
    Ports,
    Scene,
    Step,
    StepFailedError,
    Verdict,
    Waiting,
    Workflow,
    Workflows,
)
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Job
from replication.errors import ReplicationError

POLL_SECONDS = 5.0
"""Between two looks of a step that waits, for what another config server hears. What this one hears
wakes it at once.
"""

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
        workflows: Workflows,
        clock: Callable[[], int],
        *,
        instance: str,
        answer_seconds_max: float,
        boundary: Callable[[str], None] | None = None,
    ) -> None:
        self._database = database
        self._ports = ports
        self._workflows = workflows
        self._clock = clock
        self._instance = instance
        self._answer_ns = int(answer_seconds_max * 1e9)
        self._boundary = boundary or (lambda _: None)
        self._end = JobEnd(database, ports, workflows, clock)
        self._waiting: dict[uuid.UUID | str, set[asyncio.Event]] = {}

    def wake(self, source: uuid.UUID | str) -> None:
        """There is news of a node, or of a job by its id: the steps that wait for it look again."""
        for news in self._waiting.get(source, ()):
            news.set()

    async def names(self, job_id: str) -> list[str]:
        """The steps that the job was made with, whatever this version would make; none where its
        row cannot be read: it then comes to its end at once.
        """

        async def read() -> list[str]:
            async with self._database.reading() as session:
                return [step.name for step in steps_of(await find_job(session, job_id))]

        try:
            return await patiently(job_id, read)
        except ValidationError:
            structlog.get_logger().exception("a job cannot be read", job=job_id)
            return []

    async def perform(self, job_id: str, index: int) -> Ending:
        """Do a step, or wait for what it waits for. Says whether the next one is to be done.

        A defect, or what cannot be stored, fails the step: nothing of it was kept, and begun anew
        it would fail again without end.
        """
        self._boundary(f"before {index}")
        try:
            ending = await self._do(job_id, index)
        except Exception as error:
            if is_the_database_s(error):
                raise
            failing = functools.partial(self._fail_step, job_id, index, error)
            ending = await patiently(job_id, failing)
        self._boundary(f"after {index}")
        return ending

    async def _do(self, job_id: str, index: int) -> Ending:
        found = await patiently(job_id, lambda: self._attempt(job_id, index))
        if found is None or isinstance(found, Outside):
            return await self._insist(job_id, index, found)
        return found

    async def _insist(self, job_id: str, index: int, found: Outside[Any] | None) -> Ending:
        """Try again whenever there is news, and do what is to be done outside."""
        with self._listening({job_id, *await self._nodes_of(job_id)}) as news:
            while True:
                news.clear()
                if isinstance(found, Outside):
                    await self._act_outside(job_id, index, found, news)
                ending = await patiently(job_id, lambda: self._attempt(job_id, index))
                if ending is not None and not isinstance(ending, Outside):
                    return ending
                found = ending
                if found is None:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(news.wait(), POLL_SECONDS)

    @contextlib.contextmanager
    def _listening(self, sources: set[uuid.UUID | str]) -> Iterator[asyncio.Event]:
        news = asyncio.Event()
        for source in sources:
            self._waiting.setdefault(source, set()).add(news)
        try:
            yield news
        finally:
            for source in sources:
                self._waiting[source].discard(news)
                if not self._waiting[source]:
                    del self._waiting[source]

    async def _nodes_of(self, job_id: str) -> frozenset[uuid.UUID]:
        """The nodes whose news the job may wait for."""

        async def read() -> frozenset[uuid.UUID]:
            async with self._database.reading() as session:
                job = await find_job(session, job_id)
                return await self._workflow(job).nodes(session, job)

        return await patiently(job_id, read)

    async def _act_outside(
        self, job_id: str, index: int, outside: Outside[Any], news: asyncio.Event
    ) -> None:
        """What takes long, and then the record of what came of it. Cancelled with the job."""
        task = asyncio.ensure_future(outside.do())
        try:
            while not task.done():
                listening = asyncio.ensure_future(news.wait())
                await asyncio.wait(
                    {task, listening}, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                listening.cancel()
                news.clear()
                if not task.done() and await self._is_to_end(job_id):
                    return
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        record = task.result()
        self._boundary(f"acted {index}")

        async def write() -> None:
            async with self._database.writing() as session:
                job = await find_job(session, job_id, lock=True)
                scene = await self._scene(session, job)
                if scene is not None and is_open(job):
                    await record(scene)

        await patiently(job_id, write)
        self._boundary(f"recorded {index}")

    async def _is_to_end(self, job_id: str) -> bool:
        async def read() -> bool:
            async with self._database.reading() as session:
                job = await find_job(session, job_id)
                return job.cancel_asked or not is_open(job)

        return await patiently(job_id, read)

    async def conclude(self, job_id: str) -> None:
        """Close the job: what succeeded is kept, what was begun otherwise is undone."""
        self._boundary("before the end")
        await self._end.conclude(job_id)
        self._boundary("after the end")

    def _workflow(self, job: Job) -> Workflow[Any]:
        return self._workflows[JobKind(job.kind)]

    async def _scene(self, session: AsyncSession, job: Job) -> Scene | None:
        scene: Scene | None = await self._workflow(job).open(
            session, job, self._ports, self._clock()
        )
        return scene

    async def _fail_step(self, job_id: str, index: int, error: Exception) -> Ending:
        structlog.get_logger().error("a step has a defect", job=job_id, step=index, exc_info=error)
        told = JobError.of(error) if isinstance(error, ReplicationError) else DEFECT
        async with self._database.writing() as session:
            job = await find_job(session, job_id, lock=True)
            if is_open(job) and job.error is None:
                now_ns = self._clock()
                fail(job, told, now_ns)
                mark_step(job, index, now_ns, state=StepState.FAILED, ended_ns=now_ns)
        return "end"

    async def _attempt(self, job_id: str, index: int) -> Ending | Outside[Any] | None:
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
            scene = await self._scene(session, job)
            if scene is None:
                fail(job, _LOST, now_ns)
                return "end"
            if record.started_ns is None:
                job.state = JobState.RUNNING
                job.instance = self._instance
                mark_step(job, index, now_ns, state=StepState.RUNNING, started_ns=now_ns)
            began_ns = record.started_ns or now_ns
            verdict: Verdict | ReplicationError
            try:
                step = self._workflow(job).step(record.name)
                verdict = await step.act(scene)
                if isinstance(verdict, Waiting) and not step.is_patient:
                    is_late = now_ns - began_ns > self._answer_ns
                    verdict = self._late(step) if is_late else self._bounded(verdict)
            except ReplicationError as error:
                if error.retryable:
                    raise
                verdict = error
            return self._settle(job, index, verdict, now_ns)

    def _settle(
        self, job: Job, index: int, verdict: Verdict | ReplicationError, now_ns: int
    ) -> Ending | Outside[Any] | None:
        if isinstance(verdict, ReplicationError):
            fail(job, JobError.of(verdict), now_ns)
            mark_step(job, index, now_ns, state=StepState.FAILED, ended_ns=now_ns)
            return "end"
        if isinstance(verdict, Done):
            mark_step(job, index, now_ns, state=StepState.DONE, note=verdict.note, ended_ns=now_ns)
            return "go on"
        if steps_of(job)[index].note != verdict.note:
            mark_step(job, index, now_ns, note=verdict.note)
        return verdict if isinstance(verdict, Outside) else None

    def _bounded(self, verdict: Waiting) -> Verdict:
        return Waiting(f"{verdict.note}; {_duration(self._answer_ns)} at most")

    def _late(self, step: Step[Any]) -> Verdict:
        within = f"within {_duration(self._answer_ns)}"
        if not step.late:
            return Done(f"nobody answered {within}; gone on without")
        raise StepFailedError(f"{step.late} {within}", code="no_answer", hint=step.hint or None)


_LOST = JobError(
    code="superseded", message="the machine is not this job's any more; nothing was changed"
)


def _duration(nanoseconds: int) -> str:
    seconds = nanoseconds / 1e9
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"

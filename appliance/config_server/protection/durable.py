"""What runs jobs again until they have ended: workflows on DBOS Transact.

DBOS keeps, in a database of its own (a file beside ours, or a schema in our PostgreSQL), that a
workflow is to be run and by which config server. It runs on a loop and threads of its own; a step
crosses over to ours. The workflow's id is the job's: started twice, it runs once.

The application version is pinned: a config server of a newer release goes on with what an older one
began (a job's row names its steps).

Source: docs/CONTROL.md §9; docs/adr/0012-durable-jobs-on-dbos.md.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Container, Coroutine, Iterable
from typing import Any, TypeVar

import structlog
from dbos import DBOS, DBOSConfig, SetWorkflowID
from sqlalchemy.engine import make_url

from appliance.config_server.protection.performance import Ending, Performer
from appliance.config_server.store.connection import sqlite_path
from appliance.config_server.store.trouble import explained

APPLICATION = "understudy"
APPLICATION_VERSION = "1"
"""Never changes: DBOS recovers only what was begun under its own version."""

WORKFLOW = "job"
SCHEMA = "dbos"
DATABASE_FILE = "jobs.db"
POOL_SIZE = 4
POLLING_SECONDS = 0.2
"""Of a listener that we do not use; the end of the daemon waits for it."""
SCHEDULER_SECONDS = 3600.0
"""We schedule nothing with DBOS."""

_OPEN = ("PENDING", "ENQUEUED", "DELAYED")
T = TypeVar("T")


class Workflows:
    """The workflows of this config server. One per process: DBOS is."""

    def __init__(self, performer: Performer, boundary: Callable[[str], None]) -> None:
        self._performer = performer
        self._boundary = boundary
        self._loop = asyncio.get_running_loop()
        self._dbos: DBOS | None = None

        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)
        async def run(job_id: str) -> None:
            await self._job(job_id)

        self._run = run

    async def start(self, job_id: str) -> None:
        """Begin a job's workflow, unless it was begun before, here or elsewhere."""
        with explained():
            await asyncio.to_thread(self._start, job_id)

    async def recover(self, instances: Iterable[str]) -> int:
        """Take over what config servers that are dead had under way; how much it was."""
        recover = DBOS._recover_pending_workflows  # noqa: SLF001
        with explained():
            handles = await asyncio.to_thread(recover, list(instances))
        return len(handles)

    async def restart(self, job_id: str, alive: Container[str]) -> None:
        """Begin anew what DBOS takes for ended (or never heard of) while the job is open.

        alive: config servers whose work is theirs.
        """
        with explained():
            status = await asyncio.to_thread(DBOS.get_workflow_status, job_id)
        if status is not None and status.status in _OPEN:
            if status.status == "PENDING" and (status.executor_id or "") not in alive:
                await self.recover([status.executor_id or ""])
            return
        if status is not None:
            with explained():
                await asyncio.to_thread(DBOS.delete_workflow, job_id)
        await self.start(job_id)

    def _start(self, job_id: str) -> None:
        assert self._dbos is not None

        async def begin() -> None:
            with SetWorkflowID(job_id):
                await DBOS.start_workflow_async(self._run, job_id)

        # On DBOS's own loop, where it also runs what it recovers.
        self._dbos._background_event_loop.submit_coroutine(begin())  # noqa: SLF001

    async def _job(self, job_id: str) -> None:
        """The workflow. Steps are known by their place in the job's row."""
        names = await self._step("read the job", self._performer.names, job_id)
        for index, name in enumerate(names):
            ending: Ending = await self._step(name, self._performer.perform, job_id, index)
            self._boundary(f"kept {index}")
            if ending == "end":
                break
        await self._step("end the job", self._performer.conclude, job_id)
        self._boundary("kept the end")

    async def _step(
        self, name: str, do: Callable[..., Coroutine[Any, Any, T]], *arguments: Any
    ) -> T:
        async def cross() -> T:
            crossing = asyncio.run_coroutine_threadsafe(do(*arguments), self._loop)
            return await asyncio.wrap_future(crossing)

        return await DBOS.run_step_async({"name": name}, cross)

    def launch(self, config: DBOSConfig) -> None:
        """Blocks; in a thread, so that DBOS takes no loop of ours for its own."""
        self._dbos = DBOS(config=config)
        DBOS.launch()


@contextlib.asynccontextmanager
async def open_workflows(
    performer: Performer,
    database_url: str,
    *,
    instance: str,
    boundary: Callable[[str], None] | None = None,
) -> AsyncIterator[Workflows]:
    """Run what this instance had under way when it ended, and what is started."""
    _quieten()
    workflows = Workflows(performer, boundary or (lambda _: None))
    await asyncio.to_thread(workflows.launch, _config(database_url, instance))
    try:
        yield workflows
    finally:
        await asyncio.to_thread(DBOS.destroy, destroy_registry=True)


def _config(database_url: str, instance: str) -> DBOSConfig:
    return {
        "name": APPLICATION,
        "system_database_url": dbos_url(database_url),
        "dbos_system_schema": SCHEMA,
        "application_version": APPLICATION_VERSION,
        "executor_id": instance,
        "enable_otlp": False,
        "log_level": "WARNING",
        "sys_db_pool_size": POOL_SIZE,
        "use_listen_notify": False,
        "notification_listener_polling_interval_sec": POLLING_SECONDS,
        "scheduler_polling_interval_sec": SCHEDULER_SECONDS,
    }


def dbos_url(database_url: str) -> str:
    """A file beside ours, where ours is SQLite; else a schema of the same database."""
    path = sqlite_path(database_url)
    if path is not None:
        return f"sqlite:///{os.path.join(os.path.dirname(path), DATABASE_FILE)}"
    return make_url(database_url).render_as_string(hide_password=False)


class _ToStructlog(logging.Handler):
    """DBOS's lines, as ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        level = logging.getLevelName(record.levelno).lower()
        getattr(log, level, log.warning)("jobs", message=record.getMessage())


def _quieten() -> None:
    """DBOS logs through structlog, and asks its maker nothing."""
    os.environ.pop("DBOS__CLOUD", None)
    logger = logging.getLogger("dbos")
    logger.handlers = [_ToStructlog()]
    logger.propagate = False

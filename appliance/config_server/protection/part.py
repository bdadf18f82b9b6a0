"""Protection as a part of the config server: jobs, their watch, and the observer."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.identity import data_keys
from appliance.config_server.identity.vault_key import VaultKey
from appliance.config_server.nodes.part import Nodes
from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.durable import Workflows, open_workflows
from appliance.config_server.protection.instances import Watch, instance_id
from appliance.config_server.protection.observer import Observer
from appliance.config_server.protection.performance import Performer
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.protection.workflow import Workflows as WorkflowTable
from appliance.config_server.protection.workflows import WORKFLOWS
from appliance.config_server.store.engine import Database
from daemon.service import Health


@dataclass(frozen=True, slots=True)
class Protection:
    """What routes and background tasks reach. ``instance``: who we are among config servers."""

    instance: str
    ports: Ports
    performer: Performer
    workflows: Workflows
    watch: Watch
    observer: Observer
    boundary: Callable[[str], None]

    async def begin(self, job_id: str) -> None:
        """Start a job that has been written. Whoever is killed before leaves it to the sweep."""
        self.boundary("asked")
        await self.workflows.start(job_id)

    async def look_after(self, health: Health) -> None:
        """All that runs beside the API, until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.watch.run(health), name="instances")
            tasks.create_task(self.observer.run(health), name="observer")


def node_ports(nodes: Nodes, vault: VaultKey, clock: Callable[[], int]) -> Ports:
    """What jobs need of the parts that know nodes and keys."""

    async def ensure_key(session: AsyncSession, machine: uuid.UUID) -> None:
        await data_keys.ensure(session, vault, machine, clock())

    return Ports(nodes.bump, ensure_key, nodes.book.newest)


def nothing(_: str) -> None:
    """What happens at a boundary, normally."""


@contextlib.asynccontextmanager
async def open_protection(
    database: Database,
    ports: Ports,
    *,
    state_folder: str,
    database_url: str,
    config: JobsConfig,
    clock: Callable[[], int],
    boundary: Callable[[str], None] = nothing,
    workflows: WorkflowTable = WORKFLOWS,
) -> AsyncIterator[Protection]:
    """Open it, and go on with jobs that were under way.

    boundary:  called between any two durable writes of a job.
    workflows: those that there are, by their jobs' kinds.
    """
    instance = instance_id(state_folder)
    performer = Performer(
        database,
        ports,
        workflows,
        clock,
        instance=instance,
        answer_seconds_max=config.answer_seconds_max,
        boundary=boundary,
    )
    began = time.monotonic()
    async with open_workflows(
        performer, database_url, instance=instance, boundary=boundary
    ) as running:
        structlog.get_logger().debug(
            "jobs run", instance=instance, seconds=round(time.monotonic() - began, 2)
        )
        watch = Watch(database, running, config, instance=instance, clock=clock)
        yield Protection(
            instance,
            ports,
            performer,
            running,
            watch,
            Observer(database, ports, clock),
            boundary,
        )

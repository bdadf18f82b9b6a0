"""Config servers that share a database: who is alive, and whose jobs have nobody.

Another one counts as dead when its heartbeat has not moved for `silence_seconds_max` by our own
monotonic clock: wall clocks of two hosts may differ.

Source: docs/CONTROL.md §9.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import delete, select

from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.durable import Workflows
from appliance.config_server.protection.jobs import OPEN
from appliance.config_server.rounds import Trouble, go_round
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Instance, Job
from daemon.durable import write_whole
from daemon.service import Health

ID_FILE = "instance"
ID_BYTES = 8
PART = "jobs"


def instance_id(state_folder: str) -> str:
    """Who we are, over restarts: so that we find again what we had under way."""
    path = os.path.join(state_folder, ID_FILE)
    try:
        with open(path, encoding="ascii") as file:
            known = file.read().strip()
    except FileNotFoundError:
        known = ""
    if not known:
        known = secrets.token_hex(ID_BYTES)
        write_whole(path, known.encode())
    return known


@dataclass(slots=True)
class _Seen:
    """A heartbeat and when we first saw it, by our monotonic clock."""

    seen_ns: int
    at: float


class Watch:
    """Our heartbeat, and the sweep that leaves no job alone."""

    def __init__(
        self,
        database: Database,
        workflows: Workflows,
        config: JobsConfig,
        *,
        instance: str,
        clock: Callable[[], int],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._database = database
        self._workflows = workflows
        self._config = config
        self._instance = instance
        self._clock = clock
        self._now = now
        self._others: dict[str, _Seen] = {}

    async def run(self, health: Health) -> None:
        """Until it is cancelled. Raises IntegrityError for a damaged database."""
        failing = "jobs cannot be looked after"
        await go_round(PART, self._look, health, self._config.sweep_seconds, failing=failing)

    async def _look(self) -> tuple[Trouble, ...]:
        await self.sweep()
        return ()

    async def sweep(self) -> None:
        """Say that we live; take over from the dead; start what nobody started."""
        await self._beat()
        for other in await self._dead():
            count = await self._workflows.recover([other])
            structlog.get_logger().warning("took over jobs", instance=other, count=count)
            async with self._database.writing() as session:
                await session.execute(delete(Instance).where(Instance.id == other))
            self._others.pop(other, None)
        forgotten = await self._forgotten()
        if forgotten:
            alive = await self._alive()
            for job_id in forgotten:
                await self._workflows.restart(job_id, alive)

    async def _beat(self) -> None:
        async with self._database.writing() as session:
            await session.merge(
                Instance(id=self._instance, host=socket.gethostname(), seen_ns=self._clock())
            )

    async def _alive(self) -> frozenset[str]:
        async with self._database.reading() as session:
            return frozenset(await session.scalars(select(Instance.id)))

    async def _dead(self) -> list[str]:
        async with self._database.reading() as session:
            rows = (await session.scalars(select(Instance))).all()
        now = self._now()
        dead = []
        for row in rows:
            if row.id == self._instance:
                continue
            seen = self._others.get(row.id)
            if seen is None or seen.seen_ns != row.seen_ns:
                self._others[row.id] = _Seen(row.seen_ns, now)
            elif now - seen.at > self._config.silence_seconds_max:
                dead.append(row.id)
        return dead

    async def _forgotten(self) -> list[str]:
        """Open jobs that have been left alone for a while; most of them merely wait."""
        before_ns = self._clock() - int(self._config.sweep_seconds * 1e9)
        async with self._database.reading() as session:
            found = await session.scalars(
                select(Job.id).where(Job.state.in_(OPEN), Job.updated_ns < before_ns)
            )
            return list(found)

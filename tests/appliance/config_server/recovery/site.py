"""A whole config server behind its HTTPS port, and nodes beside it that do as they are told.

Example::

    async with open_site(tmp_path) as site:
        await site.protected("web-1", "db-1")
        boss = site.control.rig.operator(OperatorRole.CONTRIBUTOR)
        job = (await boss.post("plans/shop/runs", json={"kind": "test"})).json()
        assert (await site.ended(job["id"]))["state"] == "succeeded"
"""

import asyncio
import base64
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx

from appliance.config_server.recovery.intake import take_evidence
from appliance.config_server.server import BACKGROUND
from replication.control.recovery import EvidenceKind
from replication.control.role import OperatorRole
from tests.appliance.config_server.control import Control, open_control
from tests.appliance.config_server.protection.stage import WAIT_SECONDS, furnish
from tests.appliance.config_server.recovery.drills.evidence import png
from tests.appliance.config_server.recovery.stage import RecoveryNodes
from tests.appliance.config_server.running import UNLIMITED

POLL_SECONDS = 0.05


@dataclass(slots=True)
class Site:
    """What a test acts on. ``pictured``: VMs whose evidence was put."""

    control: Control
    nodes: RecoveryNodes
    pictured: set[uuid.UUID] = field(default_factory=set)

    def operator(self, role: OperatorRole = OperatorRole.CONTRIBUTOR) -> httpx.AsyncClient:
        return self.control.rig.operator(role)

    async def protected(self, *names: str) -> None:
        """Machines that are protected, and have points."""
        async with self.operator() as boss:
            jobs = []
            for name in names:
                answer = await boss.post(f"machines/{name}/protect", json={"policy": "gold"})
                assert answer.status_code == HTTPStatus.ACCEPTED, answer.text
                jobs.append(answer.json()["id"])
            for job in jobs:
                await self.ended(job)
            for name in names:
                await self.seen(f"machines/{name}", "state", "protected")

    async def ended(self, job: str) -> dict[str, Any]:
        """A job, when it has."""
        return await self.seen(f"jobs/{job}", "state", "succeeded", "failed", "cancelled")

    async def seen(self, path: str, key: str, *wanted: object) -> dict[str, Any]:
        """What the API says, when it says one of ``wanted``."""
        async with self.operator() as boss, asyncio.timeout(WAIT_SECONDS):
            while True:
                answer = await boss.get(path)
                assert answer.status_code == HTTPStatus.OK, answer.text
                found: dict[str, Any] = answer.json()
                if found[key] in wanted:
                    return found
                await asyncio.sleep(POLL_SECONDS)

    async def live(self) -> None:
        """Nodes report, and compute nodes put what they have seen."""
        server = self.control.server
        while True:
            await self.nodes.report()
            for node, heard in list(self.nodes.reports.items()):
                server.nodes.book.put(node, heard.report, heard.seen_ns)
                server.protection.performer.wake(node)
            for vm in self.nodes.vms:
                if vm.wanted == "on" and vm.id not in self.pictured:
                    await self._put(vm.id, vm.compute_id)
            await asyncio.sleep(POLL_SECONDS)

    async def _put(self, vm: uuid.UUID, compute: uuid.UUID) -> None:
        server = self.control.server
        kept = {
            EvidenceKind.CONSOLE: b"understudy: all is mounted\n",
            EvidenceKind.SCREENSHOT: base64.b64decode(png()),
        }
        async with server.database.writing() as session:
            for kind, content in kept.items():
                await take_evidence(session, compute, vm, kind, content, now_ns=server.clock())
        self.pictured.add(vm)


@contextlib.asynccontextmanager
async def open_site(folder: Path, *, port: int = 0, **config: Any) -> AsyncIterator[Site]:
    """Two machines, web-1 and db-1, that are not protected yet, and all the nodes they need."""
    tree: dict[str, Any] = {
        "jobs": {"answer_seconds_max": 20, "sweep_seconds": 0.3, "silence_seconds_max": 2},
        "recovery": {"drill_seconds": 0.1},
        "limits": UNLIMITED,
        **config,
    }
    async with open_control(folder, port=port, **tree) as control:
        server = control.server
        await furnish(server.database, server.clock)
        nodes = RecoveryNodes(server.database, server.clock)
        await nodes.furnish()
        site = Site(control, nodes)
        tasks = [asyncio.create_task(site.live())]
        tasks += [asyncio.create_task(each(server)) for each in BACKGROUND]
        try:
            yield site
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended

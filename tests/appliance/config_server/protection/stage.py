"""Protection with a real database and real durable workflows, and nodes that do as they are told.

The nodes are rows: every few milliseconds each one "reports" what its assignment would make of it.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.jobs import find_job, is_open, steps_of
from appliance.config_server.protection.part import Protection, nothing, open_protection
from appliance.config_server.protection.policies import create_policy
from appliance.config_server.protection.policy import PolicySettings
from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.table import REPLICATING
from appliance.config_server.protection.transition import REMOVING
from appliance.config_server.protection.workflow import Ports, Workflows
from appliance.config_server.protection.workflows import WORKFLOWS
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import Certificate, DataKey, Job, Machine, Node
from daemon.service import Health
from replication.control.report import (
    ApplierReport,
    BlockDevice,
    MachineReport,
    Phase,
    ProcessServerReport,
    Report,
    StoreReport,
)

GIB = 1 << 30
WAIT_SECONDS = 30.0
SERVER = uuid.UUID(int=1)
APPLIER = uuid.UUID(int=2)
MACHINE = uuid.UUID(int=3)
JOBS = JobsConfig(answer_seconds_max=20, sweep_seconds=0.3, silence_seconds_max=2)
DEVICES = (
    BlockDevice(id="wwn-0", device="/dev/sda", size_bytes=GIB, is_system=True),
    BlockDevice(id="wwn-1", device="/dev/sdb", size_bytes=GIB),
)


@dataclass(slots=True)
class Nodes:
    """All nodes. ``silent``: switched off. ``stubborn``: they do nothing of what they are told."""

    database: Database
    clock: Callable[[], int]
    reports: dict[uuid.UUID, Heard] = field(default_factory=dict)
    silent: set[uuid.UUID] = field(default_factory=set)
    stubborn: set[uuid.UUID] = field(default_factory=set)
    failed: str = ""
    carried_out: int = 0
    devices: tuple[BlockDevice, ...] = DEVICES
    keys_made: int = 0

    @property
    def ports(self) -> Ports:
        return Ports(self.bump, self.ensure_key, self.reports.get)

    async def bump(self, session: AsyncSession, nodes: Iterable[uuid.UUID]) -> None:
        for node in nodes:
            await session.execute(
                update(Node)
                .where(Node.id == node)
                .values(assignment_version=Node.assignment_version + 1)
            )

    async def ensure_key(self, session: AsyncSession, machine: uuid.UUID) -> None:
        if await session.get(DataKey, machine) is None:
            session.add(DataKey(machine_id=machine, wrapped=b"x", created_ns=self.clock()))
            self.keys_made += 1

    async def furnish(self) -> None:
        """Add what there is beside `furnish`."""

    async def report(self) -> None:
        """All that are not silent say how they are."""
        async with self.database.reading() as session:
            nodes = (await session.scalars(select(Node))).all()
            machines = (await session.scalars(select(Machine))).all()
        for node in nodes:
            if node.id in self.silent:
                continue
            before = self.reports.get(node.id)
            version = node.assignment_version
            if node.id in self.stubborn:
                version = before.report.assignment if before else 0
            self.reports[node.id] = Heard(self.clock(), self._report(node, machines, version))

    def _report(self, node: Node, machines: Iterable[Machine], version: int) -> Report:
        now_ns = self.clock()
        if node.role == "process-server":
            return ProcessServerReport(time_ns=now_ns, assignment=version, url="https://ps:9443")
        if node.role == "applier":
            stores = tuple(
                StoreReport(
                    machine=each.id,
                    generation=1,
                    applied=1,
                    newest_ns=now_ns,
                    removed=each.points == REMOVING and node.id not in self.stubborn,
                )
                for each in machines
                if each.applier_id == node.id
            )
            return ApplierReport(time_ns=now_ns, assignment=version, stores=stores)
        machine = next((each for each in machines if each.id == node.id), None)
        phase = Phase.IDLE
        if machine is not None and machine.state in REPLICATING and node.id not in self.stubborn:
            phase = Phase.FAILED if self.failed else Phase.REPLICATING
        return MachineReport(
            time_ns=now_ns,
            assignment=version,
            devices=self.devices,
            phase=phase,
            reason=self.failed,
            generation=1,
            committed=1,
            resync_request=self._carry_out(machine.resync_request if machine else 0),
        )

    def _carry_out(self, order: int) -> int:
        """As an agent does: an order that is no higher than the last one is done already."""
        self.carried_out = max(self.carried_out, order)
        return self.carried_out

    async def live(self, wake: Callable[[uuid.UUID], None]) -> None:
        while True:
            await self.report()
            for node in self.reports:
                wake(node)
            await asyncio.sleep(0.03)


@dataclass(slots=True)
class Stage:
    """What a test acts on."""

    database: Database
    nodes: Nodes
    protection: Protection
    clock: Callable[[], int]

    @contextlib.asynccontextmanager
    async def asking(self, who: str = "alice") -> AsyncIterator[Asking]:
        async with self.database.writing() as session:
            yield Asking(session, self.protection.ports, self.clock(), who)

    async def machine(self) -> Machine:
        async with self.database.reading() as session:
            return await session.get_one(Machine, MACHINE)

    async def job(self, job_id: str) -> Job:
        async with self.database.reading() as session:
            return await find_job(session, job_id)

    async def ended(self, job_id: str) -> Job:
        """The job, when it has ended."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                job = await self.job(job_id)
                if not is_open(job):
                    return job
                await asyncio.sleep(0.02)

    async def state(self, wanted: str) -> Machine:
        """The machine, when it is in that state."""
        return await self.machine_when(lambda machine: machine.state == wanted)

    async def noted(self, job_id: str, index: int) -> str:
        """What a step waits for, when it says so."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                note = steps_of(await self.job(job_id))[index].note
                if note:
                    return note
                await asyncio.sleep(0.02)

    async def machine_when(self, wanted: Callable[[Machine], bool]) -> Machine:
        """The machine, when it is as wanted."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                machine = await self.machine()
                if wanted(machine):
                    return machine
                await self.protection.observer.look()
                await asyncio.sleep(0.02)


def certificate(node: uuid.UUID, now_ns: int) -> Certificate:
    """A good one."""
    return Certificate(
        serial=uuid.uuid4().hex,
        node_id=node,
        key_digest="0" * 64,
        issued_ns=now_ns,
        expires_ns=now_ns + 90 * 86400 * 10**9,
    )


async def furnish(database: Database, clock: Callable[[], int]) -> None:
    """Nodes of each role and a policy, unless they are there."""
    async with database.writing() as session:
        if await session.get(Node, MACHINE) is not None:
            return
        for node, role, name in (
            (SERVER, "process-server", "ps-1"),
            (APPLIER, "applier", "applier-1"),
            (MACHINE, "machine", "web-1"),
        ):
            session.add(
                Node(
                    id=node,
                    role=role,
                    name=name,
                    enrolled_ns=clock(),
                    bios_uuid=uuid.UUID(int=99) if role == "machine" else None,
                )
            )
            await session.flush()
            session.add(certificate(node, clock()))
        settings = PolicySettings(resync_window="always")
        await create_policy(session, "gold", settings, lab=False, now_ns=clock())


@contextlib.asynccontextmanager
async def open_stage(
    folder: Path,
    url: str | None = None,
    *,
    jobs: JobsConfig = JOBS,
    boundary: Callable[[str], None] = nothing,
    clock: Callable[[], int] = time.time_ns,
    make_nodes: Callable[[Database, Callable[[], int]], Nodes] = Nodes,
    workflows: Workflows = WORKFLOWS,
) -> AsyncIterator[Stage]:
    """Everything that runs in a config server for protection. ``url``: SQLite in ``folder``."""
    url = url or f"sqlite+aiosqlite:///{folder}/config-server.db"
    async with open_database(url) as database, contextlib.AsyncExitStack() as stack:
        await furnish(database, clock)
        nodes = make_nodes(database, clock)
        await nodes.furnish()
        await nodes.report()
        protection = await stack.enter_async_context(
            open_protection(
                database,
                nodes.ports,
                state_folder=str(folder),
                database_url=url,
                config=jobs,
                clock=clock,
                boundary=boundary,
                workflows=workflows,
            )
        )
        tasks = [
            asyncio.create_task(nodes.live(protection.performer.wake)),
            asyncio.create_task(protection.watch.run(Health())),
        ]
        try:
            yield Stage(database, nodes, protection, clock)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

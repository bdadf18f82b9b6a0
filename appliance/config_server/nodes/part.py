"""The nodes' part of the config server: told by assignments, heard by reports."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

import structlog
from sqlalchemy import bindparam, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.identity.certificates import revoked_serials
from appliance.config_server.nodes.assignments import (
    Protected,
    for_applier,
    for_compute,
    for_machine,
    for_process_server,
)
from appliance.config_server.nodes.report_book import ReportBook
from appliance.config_server.nodes.versions import Versions
from appliance.config_server.nodes.windows import follow_windows
from appliance.config_server.store.engine import Database
from appliance.config_server.store.recovery_tables import PointHold, RecoveredVm
from appliance.config_server.store.schema import Machine, Node, Policy, ProtectedDisk
from replication.control.assignment import Assignment
from replication.control.report import ProcessServerReport, Report, read_report
from replication.control.role import NodeRole
from replication.errors import ReplicationError

WINDOW_LOOK_SECONDS = 10.0
_VERSION = select(Node.assignment_version).where(Node.id == bindparam("node"))


@dataclass(frozen=True, slots=True)
class Nodes:
    """versions: bump and wake. book: what nodes said last."""

    versions: Versions
    book: ReportBook

    async def bump(self, session: AsyncSession, nodes: Iterable[uuid.UUID]) -> None:
        """Count up the versions of ``nodes`` in this transaction; who waits wakes at its end."""
        await self.versions.bump(session, nodes)

    async def assignment(self, session: AsyncSession, node: Node, now_ns: int) -> Assignment:
        """What the node is to do, read in one transaction."""
        role = NodeRole(node.role)
        if role is NodeRole.MACHINE:
            machine = await session.get(Machine, node.id)
            policy = (
                await session.get(Policy, machine.policy_id)
                if machine is not None and machine.policy_id
                else None
            )
            disks = await session.scalars(
                select(ProtectedDisk).where(ProtectedDisk.machine_id == node.id)
            )
            url = await self.url_of(session, machine.process_server_id) if machine else ""
            own = Protected(machine, policy) if machine else None
            return for_machine(node, own, disks, process_server_url=url, now_ns=now_ns)
        if role is NodeRole.PROCESS_SERVER:
            machines = await session.scalars(select(Machine))
            return for_process_server(node, machines, await revoked_serials(session, now_ns))
        if role is NodeRole.COMPUTE:
            vms = select(RecoveredVm).where(
                RecoveredVm.compute_id == node.id, RecoveredVm.gone_ns.is_(None)
            )
            return for_compute(node, await session.scalars(vms))
        rows = await session.execute(
            select(Machine, Policy)
            .outerjoin(Policy, Machine.policy_id == Policy.id)
            .where(Machine.applier_id == node.id)
        )
        holds = select(PointHold).where(
            PointHold.applier_id == node.id, PointHold.ended_ns.is_(None)
        )
        protected = (Protected(machine, policy) for machine, policy in rows)
        return for_applier(node, protected, await session.scalars(holds))

    async def url_of(self, session: AsyncSession, process_server: uuid.UUID | None) -> str:
        """Where agents reach a process server, as it said last; empty when it never has."""
        if process_server is None:
            return ""
        heard = self.book.newest(process_server)
        found = await session.execute(
            select(Node.seen_ns, Node.report).where(Node.id == process_server)
        )
        seen_ns, document = found.one_or_none() or (0, None)
        report = heard.report if heard is not None else None
        if heard is None or seen_ns > heard.seen_ns:
            report = read_report(document) or report  # another config server heard it later
        return report.url if isinstance(report, ProcessServerReport) else ""

    async def take_report(
        self, database: Database, node: uuid.UUID, report: Report, now_ns: int
    ) -> int:
        """Put a report into the book; returns the version of the node's assignment.

        A process server that moved is told to the agents that send to it.
        """
        moved = False
        row = await database.look_up(_VERSION, node=node)
        if isinstance(report, ProcessServerReport):
            async with database.reading() as session:
                moved = await self.url_of(session, node) != report.url
        self.book.put(node, report, now_ns)
        if moved:
            await self.book.flush()
            async with database.writing() as session:
                senders = select(Machine.id).where(Machine.process_server_id == node)
                await self.bump(session, await session.scalars(senders))
        return row.assignment_version if row else 0


@contextlib.asynccontextmanager
async def open_nodes(database: Database, clock: Callable[[], int]) -> AsyncIterator[Nodes]:
    """Write reports down, see what other config servers change, follow the resync windows."""
    nodes = Nodes(Versions(database), ReportBook(database))

    async def look_at_windows() -> None:
        while True:
            try:
                await follow_windows(database, nodes.versions, clock())
            except ReplicationError as error:
                structlog.get_logger().warning("resync windows not followed", reason=str(error))
            await asyncio.sleep(WINDOW_LOOK_SECONDS)

    async with nodes.book.writing(), nodes.versions.looking():
        task = asyncio.create_task(look_at_windows(), name="resync windows")
        try:
            yield nodes
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

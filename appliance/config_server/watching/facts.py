"""Reading from the database what health depends on.

Reports are large and most are the same as at the last look: only those that are newer are read,
and of those only what this config server has not heard itself.
"""

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.protection.jobs import JobKind, JobState
from appliance.config_server.protection.table import State as Protection
from appliance.config_server.recovery.run import FailoverKind, FailoverState
from appliance.config_server.store.engine import Database
from appliance.config_server.store.recovery_tables import Failover, RecoveredVm
from appliance.config_server.store.schema import (
    Certificate,
    Job,
    Machine,
    Node,
    Policy,
    VCenter,
)
from appliance.config_server.watching.assessment import Findings, MachineRow
from appliance.config_server.watching.component_health import NodeFacts, VCenterFacts
from appliance.config_server.watching.failover_health import NO_FAILOVERS, FailoverFacts
from appliance.config_server.watching.health import MachineFacts
from appliance.config_server.watching.rpo import NS
from appliance.config_server.watching.work_facts import WorkReader
from replication.control.report import MachineReport, Report, read_report
from replication.control.role import NodeRole

FAILED_JOB_SECONDS = 7 * 86400
"""A failed job that nobody repeats is forgotten then."""

REPORTS_AT_ONCE_MAX = 200
_TOLD_BY_FAILOVERS = (JobKind.TEST_FAILOVER, JobKind.FAILOVER)


@dataclass(frozen=True, slots=True)
class _Seen:
    seen_ns: int
    report: Report | None


@dataclass(frozen=True, slots=True)
class _Rows:
    """What one look has read; ``ends``, ``failed`` and ``failovers`` by node or machine."""

    nodes: Sequence[Any]
    machines: Sequence[Any]
    vcenters: Sequence[Any]
    ends: Mapping[uuid.UUID, int]
    failed: Mapping[uuid.UUID, str]
    failovers: Mapping[uuid.UUID, FailoverFacts]
    computes: set[uuid.UUID]


class FactReader:
    """Reads findings, and remembers the newest report of each node.

    newest: what this config server has heard of a node.
    """

    def __init__(self, database: Database, newest: Callable[[uuid.UUID], Heard | None]) -> None:
        self._database = database
        self._newest = newest
        self._reports: dict[uuid.UUID, _Seen] = {}
        self._work = WorkReader()

    async def read(self, now_ns: int) -> Findings:
        async with self._database.reading() as session:
            nodes = (await session.execute(_NODES)).all()
            await self._read_reports(session, {row.id: row.seen_ns for row in nodes})
            ends = await _certificates(session)
            machines = (await session.execute(_MACHINES)).all()
            failed = await _failed_jobs(session, now_ns)
            failovers = await _failovers(session, now_ns)
            vms = await session.scalars(
                select(RecoveredVm.compute_id).where(RecoveredVm.gone_ns.is_(None)).distinct()
            )
            computes = set(vms)
            vcenters = (await session.execute(_VCENTERS)).all()
            counted = await session.execute(select(Job.state, func.count()).group_by(Job.state))
            job_counts = {state: count for state, count in counted}  # noqa: C416 - rows are no pairs
            work = await self._work.read(session, now_ns)
        # In a thread: of a thousand machines it would keep every answer waiting.
        findings = await asyncio.to_thread(
            self._findings,
            _Rows(nodes, machines, vcenters, ends, failed, failovers, computes),
            job_counts,
            now_ns,
        )
        return replace(findings, work=work)

    def _findings(self, rows: _Rows, job_counts: dict[str, int], now_ns: int) -> Findings:
        used = {row.process_server_id for row in rows.machines}
        used |= {row.applier_id for row in rows.machines} | rows.computes
        return Findings(
            machines=tuple(
                self._machine(
                    row,
                    rows.ends.get(row.id, 0),
                    rows.failed.get(row.id, ""),
                    rows.failovers.get(row.id, NO_FAILOVERS),
                )
                for row in rows.machines
            ),
            nodes=tuple(
                self._node(row, rows.ends.get(row.id, 0))
                for row in rows.nodes
                if row.role != NodeRole.MACHINE
                and (row.id in used or rows.ends.get(row.id, 0) > now_ns)
            ),
            vcenters=tuple(
                VCenterFacts(row.id, row.name, row.state, row.reason, row.seen_ns)
                for row in rows.vcenters
            ),
            job_counts=job_counts,
        )

    async def _read_reports(self, session: AsyncSession, seen: dict[uuid.UUID, int]) -> None:
        """Afterwards there is one for every node that ever reported, and for no other."""
        self._reports = {node: held for node, held in self._reports.items() if node in seen}
        newer = []
        for node, seen_ns in seen.items():
            held = self._reports.get(node)
            if not seen_ns or (held is not None and held.seen_ns == seen_ns):
                continue
            heard = self._newest(node)
            if heard is not None and heard.seen_ns == seen_ns:
                self._reports[node] = _Seen(seen_ns, heard.report)
            else:
                newer.append(node)
        for start in range(0, len(newer), REPORTS_AT_ONCE_MAX):
            some = newer[start : start + REPORTS_AT_ONCE_MAX]
            query = select(Node.id, Node.seen_ns, Node.report).where(Node.id.in_(some))
            for node, seen_ns, report in await session.execute(query):
                self._reports[node] = _Seen(seen_ns, read_report(report))

    def _machine(
        self, row: Any, certificate_ns: int, failed_job: str, failovers: FailoverFacts
    ) -> MachineRow:
        held = self._reports.get(row.id)
        report = held.report if held else None
        facts = MachineFacts(
            id=row.id,
            name=row.name,
            state=Protection(row.state),
            since_ns=row.since_ns,
            cause=row.cause,
            reason=row.reason,
            rpo_threshold_seconds=row.rpo_threshold_seconds or 0,
            app_frequency_seconds=row.app_frequency_seconds or 0,
            report=report if isinstance(report, MachineReport) else None,
            received_ns=held.seen_ns if held else 0,
            certificate_ns=certificate_ns,
            failed_job=failed_job,
            failovers=replace(failovers, uncommitted_since_ns=row.since_ns)
            if row.state == Protection.FAILED_OVER
            else failovers,
        )
        return MachineRow(facts, row.process_server_id, row.applier_id)

    def _node(self, row: Any, certificate_ns: int) -> NodeFacts:
        held = self._reports.get(row.id)
        return NodeFacts(
            id=row.id,
            role=NodeRole(row.role),
            name=row.name,
            expected_ns=row.enrolled_ns,
            report=held.report if held else None,
            received_ns=held.seen_ns if held else 0,
            certificate_ns=certificate_ns,
        )


async def _certificates(session: AsyncSession) -> dict[uuid.UUID, int]:
    """When the newest good certificate of each node ends."""
    query = (
        select(Certificate.node_id, func.max(Certificate.expires_ns))
        .where(Certificate.revoked_ns.is_(None))
        .group_by(Certificate.node_id)
    )
    return {node: int(ends) for node, ends in await session.execute(query)}


async def _failed_jobs(session: AsyncSession, now_ns: int) -> dict[uuid.UUID, str]:
    """What the newest job of each machine says, where that failed; ids sort by time."""
    newest = (
        select(func.max(Job.id))
        .where(Job.created_ns > now_ns - FAILED_JOB_SECONDS * NS)
        .group_by(Job.target_id)
    )
    query = select(Job.target_id, Job.kind, Job.error).where(
        Job.id.in_(newest), Job.state == JobState.FAILED
    )
    return {
        target: f"{kind} failed: {(error or {}).get('message', 'no reason is known')}"
        for target, kind, error in await session.execute(query)
        if target is not None and kind not in _TOLD_BY_FAILOVERS
    }


async def _failovers(session: AsyncSession, now_ns: int) -> dict[uuid.UUID, FailoverFacts]:
    """What each machine's failovers have come to: the newest, and the oldest open test."""
    found: dict[uuid.UUID, FailoverFacts] = {}
    query = select(
        Failover.machine_id, Failover.kind, Failover.state, Failover.asked_ns, Failover.error
    ).where(
        (Failover.asked_ns > now_ns - FAILED_JOB_SECONDS * NS)
        | (Failover.state == FailoverState.UP)
    )
    for row in await session.execute(query.order_by(Failover.asked_ns)):
        facts = found.get(row.machine_id, NO_FAILOVERS)
        is_test = row.kind == FailoverKind.TEST
        failed = ""
        if row.state == FailoverState.FAILED:
            failed = (row.error or {}).get("message", "no reason is known")
        since_ns = facts.test_since_ns
        if is_test and row.state == FailoverState.UP:
            since_ns = since_ns or row.asked_ns
        found[row.machine_id] = FailoverFacts(failed, is_test, since_ns)
    return found


_NODES = select(Node.id, Node.role, Node.name, Node.enrolled_ns, Node.seen_ns)
_VCENTERS = select(VCenter.id, VCenter.name, VCenter.state, VCenter.reason, VCenter.seen_ns)
_MACHINES = select(
    Machine.id,
    Machine.name,
    Machine.state,
    Machine.since_ns,
    Machine.cause,
    Machine.reason,
    Machine.process_server_id,
    Machine.applier_id,
    Policy.rpo_threshold_seconds,
    Policy.app_frequency_seconds,
).outerjoin(Policy, Machine.policy_id == Policy.id)

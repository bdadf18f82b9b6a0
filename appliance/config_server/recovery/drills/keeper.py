"""Looks after drills: begins those that are due, gathers the evidence, has everything go again.

One config server of several does it, who holds a lease: its row is looked at in each transaction
that changes something, so that two never do. All that is known is in rows: whoever is killed goes
on where it was. A drill that should have begun while no config server ran is made up for, once.

Source: docs/RECOVERY.md §6.
"""

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import delete, exc, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.audit import Audit
from appliance.config_server.caller import Caller
from appliance.config_server.protection.jobs import find_job, is_open
from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.recovery.drills.evidence import cleanup_of, gather, without_evidence
from appliance.config_server.recovery.drills.holding import (
    OPEN,
    DrillState,
    ScheduleDocument,
    begin_drill,
)
from appliance.config_server.recovery.drills.page import render
from appliance.config_server.recovery.drills.report import DrillDocument, sealed
from appliance.config_server.recovery.drills.schedule import next_at
from appliance.config_server.recovery.requests import clean_up_run
from appliance.config_server.rounds import Trouble, apart, go_round
from appliance.config_server.store.engine import Database
from appliance.config_server.store.recovery_tables import DrillReport, DrillSchedule, PlanRun
from appliance.config_server.store.schema import Job, Machine
from appliance.config_server.watching.lease import Lease, give_up, hold
from daemon.service import Health
from replication.control.role import OperatorRole
from replication.errors import ConflictError, ReplicationError

LEASE_KEY = "drills"
PART = "drills"
DUE_AT_ONCE_MAX = 10
PRUNED_AT_ONCE_MAX = 50
SCHEDULER = Caller("drill schedule", OperatorRole.OPERATOR, "this host")
_NS = 10**9


class NotOursError(Exception):
    """Another config server looks after drills."""


@dataclass(frozen=True, slots=True)
class DrillKeeper:
    """instance: who we are among config servers. begin: starts a job that has been written."""

    database: Database
    ports: Ports
    audit: Audit
    config: RecoveryConfig
    clock: Callable[[], int]
    instance: str
    begin: Callable[[str], Awaitable[None]]

    async def run(self, health: Health) -> None:
        """Until it is cancelled. Raises IntegrityError for a damaged database."""
        failing = "drills cannot be looked after"
        try:
            await go_round(PART, self.look, health, self.config.drill_seconds, failing=failing)
        finally:
            await self._give_up()

    async def look(self) -> tuple[Trouble, ...]:
        """One round; nothing where another one does it. Returns what cannot be gone on with: it
        holds up nothing else.
        """
        troubles: list[Trouble] = []
        try:
            for schedule in await self._due():
                with self._apart(f"schedule {schedule}", troubles):
                    await self._hold(schedule)
            async with self.database.reading() as session:
                found = (
                    await session.execute(
                        select(DrillReport.id, DrillReport.state).where(DrillReport.state.in_(OPEN))
                    )
                ).all()
            for drill, state in found:
                with self._apart(f"drill {drill}", troubles):
                    if state == DrillState.RUNNING:
                        await self._after_run(drill)
                    else:
                        await self._after_cleanup(drill)
            with self._apart("old reports", troubles):
                await self._prune()
        except NotOursError:
            pass
        return tuple(troubles)

    def _apart(self, what: str, troubles: list[Trouble]) -> contextlib.AbstractContextManager[None]:
        return apart(what, troubles, let=(NotOursError,))

    async def _due(self) -> list[uuid.UUID]:
        async with self.database.writing() as session:
            await self._ours(session)
            on = select(DrillReport.schedule).where(DrillReport.state.in_(OPEN))
            query = select(DrillSchedule.id).where(
                DrillSchedule.next_ns <= self.clock(), DrillSchedule.name.not_in(on)
            )
            ordered = query.order_by(DrillSchedule.next_ns).limit(DUE_AT_ONCE_MAX)
            return list(await session.scalars(ordered))

    async def _hold(self, schedule: uuid.UUID) -> None:
        """Begin a drill that is due, in the transaction that says when the next one is."""
        job_id = ""
        async with self.database.writing() as session:
            await self._ours(session)
            row = await session.get(DrillSchedule, schedule, with_for_update=True)
            now_ns = self.clock()
            if row is None or row.next_ns > now_ns or await self._is_on(session, row):
                return
            document = ScheduleDocument.model_validate(row.document)
            row.last_ns, row.next_ns = now_ns, next_at(document.timing, now_ns)
            row.revision += 1
            asking = Asking(session, self.ports, now_ns, f"schedule {row.name}")
            outcome = "done"
            try:
                async with session.begin_nested():
                    drill, job = await begin_drill(
                        asking,
                        self.config,
                        document.request,
                        plan=row.plan,
                        machine=row.machine_id,
                        schedule=row.name,
                    )
                    job_id = job.id
            except ReplicationError as error:
                if error.retryable:
                    raise
                drill, outcome = await self._stillborn(asking, row, str(error)), error.code
            except exc.SQLAlchemyError:
                raise  # the database's own trouble
            except Exception as error:  # noqa: BLE001 - told by its report and the log
                structlog.get_logger().exception("a drill cannot begin", schedule=row.name)
                reason = f"a defect of the config server: {type(error).__name__}"
                drill, outcome = await self._stillborn(asking, row, reason), "defect"
            detail = {"schedule": row.name, "drill": str(drill.id)}
            self.audit.add(
                session, SCHEDULER, "drill.begin", drill.target, outcome=outcome, detail=detail
            )
        if job_id:
            await self.begin(job_id)

    async def _is_on(self, session: AsyncSession, row: DrillSchedule) -> bool:
        """Whether its last drill has not ended; the one that is due waits for it."""
        query = select(DrillReport.id).where(
            DrillReport.schedule == row.name, DrillReport.state.in_(OPEN)
        )
        return await session.scalar(query.limit(1)) is not None

    async def _stillborn(self, asking: Asking, row: DrillSchedule, reason: str) -> DrillReport:
        """The report of a drill that could not begin: that is evidence as well."""
        machine = await asking.session.get(Machine, row.machine_id) if row.machine_id else None
        target = row.plan or (machine.name if machine is not None else str(row.machine_id))
        drill = uuid.uuid4()
        tree = sealed(
            DrillDocument(
                id=str(drill),
                of="plan" if row.plan else "machine",
                target=target,
                schedule=row.name,
                asked_by=asking.who,
                passed=False,
                reason=reason,
                began_ns=asking.now_ns,
                ended_ns=asking.now_ns,
            )
        )
        report = DrillReport(
            id=drill,
            schedule=row.name,
            target=target,
            state=DrillState.FAILED,
            asked_by=asking.who,
            began_ns=asking.now_ns,
            ended_ns=asking.now_ns,
            document=tree,
            page=render(tree),
        )
        asking.session.add(report)
        await asking.session.flush()
        return report

    async def _after_run(self, drill: uuid.UUID) -> None:
        """When its run has ended: keep the evidence, and have all of it go."""
        job_id = ""
        async with self.database.writing() as session:
            await self._ours(session)
            row = await session.get(DrillReport, drill, with_for_update=True)
            run = await session.scalar(select(PlanRun).where(PlanRun.drill_id == drill))
            if row is None or row.state != DrillState.RUNNING or run is None:
                return
            now_ns = self.clock()
            ended = await find_job(session, run.job_id)
            if is_open(ended):
                return
            waited_ns = now_ns - (ended.ended_ns or now_ns)
            may_wait = waited_ns < self.config.evidence_seconds * _NS
            report = await self._evidence(session, row, run, ended, may_wait=may_wait)
            if report is None:
                return
            asking = Asking(session, self.ports, now_ns, row.asked_by)
            try:
                async with session.begin_nested():
                    job_id = (await clean_up_run(asking, run.id)).id
            except ConflictError:
                job_id = ""  # it came to nothing, so nothing is left
            row.document = {"report": report.model_dump(mode="json"), "cleanup": job_id}
            row.state = DrillState.CLEANING
        if job_id:
            await self.begin(job_id)

    async def _evidence(
        self, session: AsyncSession, row: DrillReport, run: PlanRun, ended: Job, *, may_wait: bool
    ) -> DrillDocument | None:
        """None: more may come. What cannot be read for long keeps no machine running: the report
        says so and nothing else.
        """
        try:
            found = await gather(session, row, run, ended)
        except (ReplicationError, exc.SQLAlchemyError):
            raise  # the database's own trouble
        except Exception as error:
            if may_wait:
                raise
            structlog.get_logger().exception("a drill leaves no evidence", drill=str(row.id))
            told = f"its evidence cannot be read, a defect of the config server: {error!r}"
            return without_evidence(row, run, ended, told)
        return None if found.unseen and may_wait else found.document

    async def _after_cleanup(self, drill: uuid.UUID) -> None:
        """When all has gone: the report, whole."""
        async with self.database.reading() as session:
            row = await session.get(DrillReport, drill)
            if row is None or row.state != DrillState.CLEANING:
                return
            kept: dict[str, Any] = row.document
            cleanup = None
            if kept["cleanup"]:
                if is_open(await find_job(session, kept["cleanup"])):
                    return
                cleanup = await cleanup_of(session, kept["cleanup"])
        document = DrillDocument.model_validate(kept["report"])
        changes: dict[str, Any] = {"ended_ns": self.clock(), "cleanup": cleanup}
        if cleanup is not None and cleanup.state != "succeeded":
            changes["passed"] = False
            changes["reason"] = document.reason or f"it was not cleaned up: {cleanup.error}"
        tree = sealed(document.model_copy(update=changes))
        page = await asyncio.to_thread(render, tree)
        async with self.database.writing() as session:
            await self._ours(session)
            row = await session.get(DrillReport, drill, with_for_update=True)
            if row is None or row.state != DrillState.CLEANING:
                return
            row.document, row.page = tree, page
            row.state = DrillState.PASSED if tree["passed"] else DrillState.FAILED
            row.ended_ns = tree["ended_ns"]
            detail = {"drill": str(drill), "digest": tree["digest"], "passed": tree["passed"]}
            self.audit.add(session, SCHEDULER, "drill.end", row.target, detail=detail)
        structlog.get_logger().info("drill ended", drill=str(drill), passed=tree["passed"])

    async def _prune(self) -> None:
        """Delete the oldest reports beyond so many."""
        query = (
            select(DrillReport.id)
            .where(DrillReport.state.not_in(OPEN))
            .order_by(DrillReport.began_ns.desc(), DrillReport.id)
            .offset(self.config.drill_count_max)
            .limit(PRUNED_AT_ONCE_MAX)
        )
        async with self.database.reading() as session:
            over = list(await session.scalars(query))
        if not over:
            return
        async with self.database.writing() as session:
            await self._ours(session)
            await session.execute(delete(DrillReport).where(DrillReport.id.in_(over)))

    async def _ours(self, session: AsyncSession) -> None:
        if await hold(session, self.instance, self.clock(), key=LEASE_KEY) is Lease.OTHERS:
            raise NotOursError

    async def _give_up(self) -> None:
        try:
            async with self.database.writing() as session:
                await give_up(session, self.instance, key=LEASE_KEY)
        except ReplicationError:
            return  # it runs out by itself

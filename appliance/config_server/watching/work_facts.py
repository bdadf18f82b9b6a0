"""Reading from the database what the health of the config server's own work depends on.

A report of a drill holds screenshots and may be large: of those that have failed the reason is read
once.
"""

import uuid
from collections.abc import Mapping, Sequence

from sqlalchemy import and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.jobs import NOT_UNDONE, JobState
from appliance.config_server.recovery.drills.holding import OPEN, DrillState
from appliance.config_server.store.recovery_tables import DrillReport, DrillSchedule
from appliance.config_server.store.schema import Job, Machine
from appliance.config_server.watching.rpo import NS
from appliance.config_server.watching.work_health import LeftFacts, ScheduleFacts, WorkFacts

LEFT_SECONDS = 7 * 86400
"""A job that could not undo what it had begun is told of for so long, unless something newer was
asked of its machine or plan.
"""

_LEFT = uuid.UUID("6f1d5f0e-64f0-4f3c-8b7a-4a8f5a0f9d7e")
"""The name space of jobs, whose ids are no UUIDs."""


class WorkReader:
    """Reads them, and remembers the reasons of drills that have failed."""

    def __init__(self) -> None:
        self._reasons: dict[uuid.UUID, str] = {}

    async def read(self, session: AsyncSession, now_ns: int) -> tuple[WorkFacts, ...]:
        """Of all schedules, and of all jobs that have left something."""
        return (*await self._schedules(session), *await _left(session, now_ns))

    async def _schedules(self, session: AsyncSession) -> Sequence[ScheduleFacts]:
        rows = (await session.execute(_SCHEDULES)).all()
        if not rows:
            return []
        on = set(
            await session.scalars(select(DrillReport.schedule).where(DrillReport.state.in_(OPEN)))
        )
        failed = [row.drill for row in rows if row.state == DrillState.FAILED]
        self._reasons = await self._why(session, failed)
        return [
            ScheduleFacts(
                row.id,
                row.name,
                row.plan or row.machine or "a machine that is gone",
                self._reasons.get(row.drill, ""),
                row.next_ns,
                row.name in on,
            )
            for row in rows
        ]

    async def _why(
        self, session: AsyncSession, failed: Sequence[uuid.UUID]
    ) -> dict[uuid.UUID, str]:
        found = {drill: self._reasons[drill] for drill in failed if drill in self._reasons}
        new = [drill for drill in failed if drill not in found]
        if new:
            query = select(DrillReport.id, DrillReport.document["reason"].as_string())
            for drill, why in await session.execute(query.where(DrillReport.id.in_(new))):
                found[drill] = why or "no reason is known"
        return found


async def _left(session: AsyncSession, now_ns: int) -> Sequence[LeftFacts]:
    """The newest job of each machine or plan, where it could not be undone; ids sort by time."""
    newest = (
        select(func.max(Job.id))
        .where(Job.created_ns > now_ns - LEFT_SECONDS * NS)
        .group_by(Job.target_id, Job.target)
    )
    query = select(Job.id, Job.target, Job.error).where(
        Job.id.in_(newest),
        Job.state == JobState.FAILED,
        Job.error["code"].as_string() == NOT_UNDONE,
    )
    return [
        LeftFacts(uuid.uuid5(_LEFT, job), target, job, *_words(error))
        for job, target, error in await session.execute(query)
    ]


def _words(error: Mapping[str, str] | None) -> tuple[str, str]:
    told = error or {}
    return told.get("message", ""), told.get("hint", "")


_ENDED = (
    select(DrillReport.schedule, func.max(DrillReport.began_ns).label("began_ns"))
    .where(DrillReport.schedule != "", DrillReport.state.not_in(OPEN))
    .group_by(DrillReport.schedule)
    .subquery()
)
_SCHEDULES = (
    select(
        DrillSchedule.id,
        DrillSchedule.name,
        DrillSchedule.plan,
        DrillSchedule.next_ns,
        Machine.name.label("machine"),
        DrillReport.id.label("drill"),
        DrillReport.state,
    )
    .outerjoin(Machine, Machine.id == DrillSchedule.machine_id)
    .outerjoin(
        _ENDED,
        and_(
            _ENDED.c.schedule == DrillSchedule.name,
            # Those of a schedule that was called the same are not of this one.
            _ENDED.c.began_ns >= DrillSchedule.created_ns,
        ),
    )
    .outerjoin(
        DrillReport,
        and_(DrillReport.schedule == _ENDED.c.schedule, DrillReport.began_ns == _ENDED.c.began_ns),
    )
)

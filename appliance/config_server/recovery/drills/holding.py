"""Drills and their schedules as rows: begun, scheduled, unscheduled.

Source: docs/RECOVERY.md §6, §8.
"""

import uuid
from enum import StrEnum

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.machines import find_node
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.recovery.drills.schedule import Timing, next_at
from appliance.config_server.recovery.plans.catalogue import find_plan
from appliance.config_server.recovery.plans.running import RunRequest, begin_plan
from appliance.config_server.recovery.requests import begin_failover
from appliance.config_server.recovery.run import FailoverKind, RunMachine
from appliance.config_server.store.recovery_tables import DrillReport, DrillSchedule
from appliance.config_server.store.schema import Job, Machine
from replication.errors import ConflictError, NotFoundError

SCHEDULES_MAX = 1000


class DrillState(StrEnum):
    """CLEANING: the run has ended and its evidence is kept; the second site is being tidied."""

    RUNNING = "running"
    CLEANING = "cleaning-up"
    PASSED = "passed"
    FAILED = "failed"


OPEN = (DrillState.RUNNING, DrillState.CLEANING)


class ScheduleDocument(BaseModel):
    """When, and how the run is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timing: Timing
    request: RunRequest


async def begin_drill(
    asking: Asking,
    config: RecoveryConfig,
    request: RunRequest,
    *,
    plan: str = "",
    machine: uuid.UUID | None = None,
    schedule: str = "",
) -> tuple[DrillReport, Job]:
    """Begin a drill of a plan, or of a machine. Raises what a test failover of it would."""
    request = request.model_copy(update={"kind": FailoverKind.TEST})
    drill = uuid.uuid4()
    if plan:
        job = await begin_plan(asking, config, plan, request, drill=drill)
    else:
        assert machine is not None
        options = request.options.model_copy(update={"wait_seconds": request.wait_seconds})
        job = await begin_failover(
            asking,
            FailoverKind.TEST,
            RunMachine(id=machine, point=request.point, options=options),
            network=request.network,
            compute=request.compute,
            notes=request.notes,
            drill=drill,
        )
    row = DrillReport(
        id=drill,
        schedule=schedule,
        target=job.target,
        state=DrillState.RUNNING,
        asked_by=asking.who,
        began_ns=asking.now_ns,
        document={},
        page="",
    )
    asking.session.add(row)
    await asking.session.flush()
    return row, job


async def find_drill(session: AsyncSession, drill: uuid.UUID) -> DrillReport:
    """Raises NotFoundError."""
    row = await session.get(DrillReport, drill)
    if row is None:
        raise NotFoundError(f"there is no drill {drill}", hint="`understudy drills list`")
    return row


async def machine_of(session: AsyncSession, reference: str, now_ns: int) -> Machine:
    """A machine that is or was protected, by id or name. Raises NotFoundError, ConflictError."""
    node = await find_node(session, reference, now_ns)
    row = await session.get(Machine, node.id)
    if row is None:
        raise ConflictError(f"{node.name} is not protected", hint="`understudy protect` first")
    return row


async def add_schedule(
    session: AsyncSession,
    name: str,
    document: ScheduleDocument,
    *,
    plan: str,
    machine: uuid.UUID | None,
    who: str,
    now_ns: int,
) -> DrillSchedule:
    """Raises ConflictError for a name that is taken, NotFoundError for a plan that is not there."""
    taken = await session.scalar(select(DrillSchedule.id).where(DrillSchedule.name == name))
    if taken is not None:
        raise ConflictError(f"there is a schedule {name} already", hint="choose another name")
    count = len((await session.scalars(select(DrillSchedule.id).limit(SCHEDULES_MAX))).all())
    if count >= SCHEDULES_MAX:
        raise ConflictError(f"there are {SCHEDULES_MAX} schedules already", hint="delete some")
    if plan:
        await find_plan(session, plan)
    row = DrillSchedule(
        id=uuid.uuid4(),
        name=name,
        plan=plan,
        machine_id=machine,
        document=document.model_dump(mode="json"),
        next_ns=next_at(document.timing, now_ns),
        last_ns=0,
        created_by=who,
        created_ns=now_ns,
        revision=1,
    )
    session.add(row)
    await session.flush()
    return row


async def delete_schedule(session: AsyncSession, name: str) -> None:
    """Raises NotFoundError."""
    row = await session.scalar(
        select(DrillSchedule).where(DrillSchedule.name == name).with_for_update()
    )
    if row is None:
        raise NotFoundError(
            f"there is no schedule {name}", hint="`understudy drills schedules` lists them"
        )
    await session.delete(row)
    await session.flush()

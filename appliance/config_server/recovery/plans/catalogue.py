"""Plans in the database: made, changed under a revision, copied, deleted.

Source: docs/RECOVERY.md §5, §8.
"""

import uuid

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.recovery.plans.document import PlanDocument
from appliance.config_server.recovery.plans.plan import Plan as PlanValue
from appliance.config_server.recovery.plans.plan import Problem, shape_problems
from appliance.config_server.recovery.plans.secrets import Vault, seal_headers
from appliance.config_server.store.recovery_tables import DrillSchedule, Plan
from replication.errors import ConflictError, InputError, NotFoundError

PLANS_MAX = 1000
PROBLEMS_TOLD_MAX = 5


class PlanError(InputError):
    """A plan says something that makes no sense, or cannot run as things are."""

    code = "plan"


async def find_plan(session: AsyncSession, name: str, *, lock: bool = False) -> Plan:
    """Raises NotFoundError."""
    query = select(Plan).where(Plan.name == name)
    row = await session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFoundError(f"there is no plan {name}", hint="`understudy plans list` shows them")
    return row


def document_of(row: Plan) -> PlanDocument:
    """As it is stored: the values of webhooks' headers are sealed."""
    return PlanDocument.model_validate(row.document)


async def create_plan(
    session: AsyncSession,
    vault: Vault,
    document: PlanDocument,
    *,
    who: str,
    now_ns: int,
) -> Plan:
    """Raises PlanError for a shape that makes no sense, ConflictError for a name that is taken."""
    refuse_shape(document)
    await _refuse_name(session, document.name)
    if len((await session.scalars(select(Plan.id).limit(PLANS_MAX))).all()) >= PLANS_MAX:
        raise ConflictError(f"there are {PLANS_MAX} plans already", hint="delete some")
    row = Plan(
        id=uuid.uuid4(),
        name=document.name,
        document=seal_headers(vault, document, None).model_dump(mode="json"),
        created_by=who,
        created_ns=now_ns,
        updated_ns=now_ns,
        revision=1,
    )
    session.add(row)
    await session.flush()
    return row


async def change_plan(
    session: AsyncSession,
    vault: Vault,
    name: str,
    document: PlanDocument,
    *,
    revision: int | None,
    now_ns: int,
) -> Plan:
    """Put another document in its place; it may have another name. ``revision``: that was read."""
    row = await find_plan(session, name, lock=True)
    if revision is not None and revision != row.revision:
        raise ConflictError(
            f"plan {name} was changed meanwhile: it has revision {row.revision}, not {revision}",
            hint="read it again and decide anew",
        )
    refuse_shape(document)
    if document.name != name:
        await _refuse_name(session, document.name)
        schedules = await session.scalars(select(DrillSchedule).where(DrillSchedule.plan == name))
        for schedule in schedules:
            schedule.plan = document.name
    row.document = seal_headers(vault, document, document_of(row)).model_dump(mode="json")
    row.name = document.name
    row.updated_ns = now_ns
    row.revision += 1
    await session.flush()
    return row


async def clone_plan(
    session: AsyncSession, name: str, new_name: str, *, who: str, now_ns: int
) -> Plan:
    """A copy, headers and all."""
    stored = document_of(await find_plan(session, name))
    row = Plan(
        id=uuid.uuid4(),
        name=new_name,
        document={**stored.model_dump(mode="json"), "name": new_name},
        created_by=who,
        created_ns=now_ns,
        updated_ns=now_ns,
        revision=1,
    )
    await _refuse_name(session, new_name)
    session.add(row)
    await session.flush()
    return row


async def delete_plan(session: AsyncSession, name: str) -> None:
    """Raises ConflictError while drills of it are scheduled."""
    row = await find_plan(session, name, lock=True)
    query = select(DrillSchedule.name).where(DrillSchedule.plan == name).limit(1)
    schedule = await session.scalar(query)
    if schedule is not None:
        raise ConflictError(
            f"drills of plan {name} are scheduled: {schedule}",
            hint=f"`understudy drills unschedule {schedule}` first",
        )
    await session.delete(row)
    await session.flush()


def refuse_shape(document: PlanDocument) -> None:
    """Raise PlanError for what is wrong with a plan whatever machines there are."""
    refuse_fatal(shape_problems(PlanValue.of(document)))


def refuse_fatal(problems: tuple[Problem, ...]) -> None:
    """Raise PlanError that names what stands against a plan."""
    fatal = [problem for problem in problems if problem.fatal]
    if not fatal:
        return
    told = [
        f"{each.where}: {each.message}" if each.where else each.message
        for each in fatal[:PROBLEMS_TOLD_MAX]
    ]
    if len(fatal) > PROBLEMS_TOLD_MAX:
        told.append(f"and {len(fatal) - PROBLEMS_TOLD_MAX} more")
    raise PlanError("; ".join(told), hint=fatal[0].hint or None)


async def _refuse_name(session: AsyncSession, name: str) -> None:
    if await session.scalar(select(Plan.id).where(Plan.name == name)) is not None:
        raise ConflictError(
            f"there is a plan {name} already",
            hint=f"choose another name; `understudy plans edit {name}` changes that plan, "
            f"`understudy plans delete {name}` deletes it",
        )

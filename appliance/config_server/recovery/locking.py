"""Locks: points that cannot be deleted before a date.

Source: docs/RECOVERY.md §2, §8.
"""

import uuid

from sqlalchemy import select

from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.transition import REMOVING
from appliance.config_server.recovery.intake import stored_points
from appliance.config_server.recovery.room import refuse_full, refuse_more_locks
from appliance.config_server.store.recovery_tables import PointHold
from appliance.config_server.store.schema import Machine
from replication.errors import ConflictError, InputError, NotFoundError

LOCK_YEARS_MAX = 10
LOCK_NS_MAX = LOCK_YEARS_MAX * 366 * 86400 * 10**9


async def lock_point(asking: Asking, machine: Machine, point: str, until_ns: int) -> PointHold:
    """Have a point kept until then; a lock may be made longer, never shorter."""
    if until_ns <= asking.now_ns:
        raise InputError("until_ns: it is over already")
    if until_ns > asking.now_ns + LOCK_NS_MAX:
        raise InputError(f"until_ns: a lock is for {LOCK_YEARS_MAX} years at most")
    if machine.applier_id is None or machine.points == REMOVING or not machine.points:
        raise ConflictError(f"there are no points of {machine.name}, or they are being deleted")
    lock = await asking.session.scalar(
        select(PointHold)
        .where(
            PointHold.machine_id == machine.id,
            PointHold.choice == point,
            PointHold.failover_id.is_(None),
            PointHold.ended_ns.is_(None),
        )
        .with_for_update()
    )
    if lock is None:
        if point not in {listed.name for listed in await stored_points(asking.session, machine)}:
            raise NotFoundError(
                f"{machine.name} has no recovery point {point}",
                hint=f"`understudy points {machine.name}` lists those that its applier has told of",
            )
        await refuse_more_locks(asking.session, machine.applier_id)
        await refuse_full(asking.session, [machine.applier_id])
        lock = PointHold(
            id=uuid.uuid4(),
            machine_id=machine.id,
            applier_id=machine.applier_id,
            choice=point,
            until_ns=until_ns,
            asked_by=asking.who,
            created_ns=asking.now_ns,
        )
        asking.session.add(lock)
    elif until_ns < lock.until_ns:
        raise ConflictError(
            f"the point {point} of {machine.name} is locked for longer than that",
            hint="a lock is made longer, never shorter",
        )
    lock.until_ns = until_ns
    await asking.ports.bump(asking.session, [machine.applier_id])
    return lock

"""Keeping the audit log within its bounds: by age, and by count for whoever writes too much.

Entries that go before their time are told of; those that are old enough go as configured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.config import AuditConfig
from appliance.config_server.rounds import Trouble, go_round
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import AuditEntry
from daemon.service import Health

HEALTH_PART = "audit"
PRUNE_SECONDS = 60.0
DELETED_AT_ONCE_MAX = 1000
_DAY_NS = 86400 * 10**9


@dataclass(frozen=True, slots=True)
class Pruned:
    """How many were deleted because they were old, and how many because they were too many."""

    old: int = 0
    excess: int = 0

    def __add__(self, other: "Pruned") -> "Pruned":
        return Pruned(self.old + other.old, self.excess + other.excess)


async def keep_pruning(
    database: Database, config: AuditConfig, health: Health, clock: Callable[[], int]
) -> None:
    """Until it is cancelled. Raises IntegrityError for a damaged database."""

    async def look() -> list[Trouble]:
        return _told(await prune_all(database, config, clock()), config)

    failing = "the audit log is not pruned"
    await go_round(HEALTH_PART, look, health, PRUNE_SECONDS, failing=failing, is_grave=False)


async def prune_all(database: Database, config: AuditConfig, now_ns: int) -> Pruned:
    """Delete all that is beyond the bounds and nothing else, some at a time."""
    total = Pruned()
    while True:
        async with database.writing() as session:
            found = await prune(session, config, now_ns)
        total += found
        if found == Pruned():
            break
    if total.excess:
        structlog.get_logger().warning(
            "audit entries deleted before their time", count=total.excess, days=config.days
        )
    return total


async def prune(session: AsyncSession, config: AuditConfig, now_ns: int) -> Pruned:
    """The oldest that are too old, else those that are too many; DELETED_AT_ONCE_MAX at most."""
    ids = select(AuditEntry.id)
    is_old = AuditEntry.at_ns < now_ns - config.days * _DAY_NS
    old = list(await session.scalars(ids.where(is_old).limit(DELETED_AT_ONCE_MAX)))
    if old:
        await session.execute(delete(AuditEntry).where(AuditEntry.id.in_(old)))
        return Pruned(old=len(old))
    first, last = (
        await session.execute(select(func.min(AuditEntry.id), func.max(AuditEntry.id)))
    ).one()
    if first is None or last - first < config.count_max:
        return Pruned()  # ids may have gaps: there are no more than that
    count = await session.scalar(select(func.count()).select_from(AuditEntry)) or 0
    excess = min(count - config.count_max, DELETED_AT_ONCE_MAX)
    if excess <= 0:
        return Pruned()
    oldest = list(await session.scalars(ids.order_by(AuditEntry.id).limit(excess)))
    await session.execute(delete(AuditEntry).where(AuditEntry.id.in_(oldest)))
    return Pruned(excess=len(oldest))


def _told(found: Pruned, config: AuditConfig) -> list[Trouble]:
    if not found.excess:
        return []
    why = (
        f"{found.excess} entries younger than {config.days} days were deleted within the last "
        f"minute: there are more than audit.count_max ({config.count_max})"
    )
    return [Trouble("the audit log", why)]

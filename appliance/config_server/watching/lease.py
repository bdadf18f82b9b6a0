"""Which of several config servers watches, or looks after drills: a row that one of them holds for
a while.

Who writes events looks at the row in the same transaction, so that two never write at once, however
their clocks differ.
"""

from enum import Enum

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.store.schema import Setting
from appliance.config_server.watching.rpo import NS

LEASE_KEY = "watching"
LEASE_SECONDS = 30


class Lease(Enum):
    """TAKEN: another one may have watched since we last did. KEPT: nobody has."""

    OTHERS = 0
    TAKEN = 1
    KEPT = 2


async def hold(session: AsyncSession, holder: str, now_ns: int, *, key: str = LEASE_KEY) -> Lease:
    """Take or keep it for LEASE_SECONDS from now. ``key``: of what is held."""
    row = await session.scalar(select(Setting).where(Setting.key == key).with_for_update())
    value = {"holder": holder, "until_ns": now_ns + LEASE_SECONDS * NS}
    if row is None:
        session.add(Setting(key=key, value=value))
        await session.flush()
        return Lease.TAKEN
    if row.value.get("holder") == holder:
        row.value = value
        return Lease.KEPT
    until_ns = int(row.value.get("until_ns", 0))
    # One that ends later than anybody takes it was written by a clock that was wrong.
    if now_ns < until_ns <= now_ns + 2 * LEASE_SECONDS * NS:
        return Lease.OTHERS
    row.value = value
    return Lease.TAKEN


async def give_up(session: AsyncSession, holder: str, *, key: str = LEASE_KEY) -> None:
    """Let another one have it at once."""
    row = await session.scalar(select(Setting).where(Setting.key == key).with_for_update())
    if row is not None and row.value.get("holder") == holder:
        row.value = {"holder": "", "until_ns": 0}

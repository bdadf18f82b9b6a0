"""Resync windows open and close by the clock; the agents are told when they do.

Which were open at the last look is kept in the database, so that a restart misses no edge.
"""

from sqlalchemy import select

from appliance.config_server.nodes.versions import Versions
from appliance.config_server.protection.window import resync_allowed
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Machine, Policy, Setting

SETTING = "resync-windows"


async def follow_windows(database: Database, versions: Versions, now_ns: int) -> int:
    """Tell the agents whose policy's window has opened or closed; how many there are."""
    async with database.reading() as session:
        windows = set(await session.scalars(select(Policy.resync_window).distinct()))
        stored = await session.scalar(select(Setting.value).where(Setting.key == SETTING))
    opened = {window: resync_allowed(window, now_ns) for window in sorted(windows)}
    if opened == stored:
        return 0
    async with database.writing() as session:
        row = await session.scalar(select(Setting).where(Setting.key == SETTING).with_for_update())
        before = row.value if row else {}
        changed = [window for window in opened if opened[window] != before.get(window)]
        found = select(Machine.id).join(Policy, Machine.policy_id == Policy.id)
        agents = list(await session.scalars(found.where(Policy.resync_window.in_(changed))))
        await versions.bump(session, agents)
        if row is None:
            session.add(Setting(key=SETTING, value=opened))
        else:
            row.value = opened
    return len(agents)

"""What an administrator does on the config server's own host, with its database and no API: the
first token, above all. Each prints what it did.
"""

import contextlib
import datetime as dt
import time
from collections.abc import AsyncIterator

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.audit import Audit
from appliance.config_server.caller import LOCAL_OPERATOR
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.store.engine import open_database
from appliance.config_server.store.migration import (
    current_revision,
    database_name,
    head_revision,
    migrate,
)
from appliance.config_server.store.schema import Node, Token
from appliance.config_server.tokens import create_token, revoke_token
from replication.control.memory import RESTORED_STEP
from replication.control.role import OperatorRole
from replication.errors import ConfigError


async def check(config: ConfigServerConfig) -> str:
    """What the configuration amounts to; nothing is changed. Raises ConfigError."""
    url = config.database_url()
    found = await current_revision(url)
    where = f"database {database_name(url)}"
    if found is None:
        return f"{where}: none yet, the first start makes it"
    if found == head_revision():
        return f"{where}: schema {found}"
    return f"{where}: schema {found}, the next start brings it to {head_revision()}"


async def bring_up_to_date(config: ConfigServerConfig) -> str:
    """Migrate the database, as each start does."""
    await migrate(config.database_url())
    return f"database {database_name(config.database_url())}: schema {head_revision()}"


async def make_token(
    config: ConfigServerConfig, name: str, role: OperatorRole, *, days: int
) -> str:
    """Make a token and return it."""
    detail = {"role": role, "days": days}
    async with _changing(config, "token.create", name, detail) as session:
        new = await create_token(
            session,
            name,
            role,
            days=days,
            now_ns=time.time_ns(),
            created_by=LOCAL_OPERATOR.name,
        )
    return new.secret


async def confirm_restored(config: ConfigServerConfig) -> str:
    """Have the nodes follow wholly what this database says, though it is older than what they
    followed. Also what it says of ends and deletions.
    """
    async with _changing(config, "nodes.restored", "all nodes", detail := {}) as session:
        raised = update(Node).values(assignment_version=Node.assignment_version + RESTORED_STEP)
        await session.execute(raised)
        count = detail["nodes"] = await session.scalar(select(func.count()).select_from(Node))
    return (
        f"{count} nodes follow this database wholly from now on, also where it ends protection"
        " or deletes points; say it again when more nodes have enrolled again"
    )


async def end_token(config: ConfigServerConfig, name: str) -> str:
    """Revoke a token."""
    async with _changing(config, "token.revoke", name, {}) as session:
        await revoke_token(session, name, now_ns=time.time_ns())
    return f"{name} is revoked"


async def tell_tokens(config: ConfigServerConfig) -> str:
    """All tokens, one a line."""
    if await current_revision(config.database_url()) is None:
        raise ConfigError("there is no database yet", hint="make the first token")
    async with open_database(config.database_url()) as database, database.reading() as session:
        rows = (await session.scalars(select(Token).order_by(Token.name))).all()
    return "\n".join(_line(row) for row in rows)


def _line(row: Token) -> str:
    until = dt.datetime.fromtimestamp(row.expires_ns / 1e9, dt.UTC).isoformat(timespec="minutes")
    state = "good until"
    if row.revoked_ns is not None:
        state = "revoked; was good until"
    elif row.expires_ns <= time.time_ns():
        state = "expired"
    return f"{row.name}  {row.role}  {state} {until}"


@contextlib.asynccontextmanager
async def _changing(
    config: ConfigServerConfig, action: str, target: str, detail: dict[str, object]
) -> AsyncIterator[AsyncSession]:
    async with open_database(config.database_url()) as database, database.writing() as session:
        yield session
        audit = Audit(database, time.time_ns)
        audit.add(session, LOCAL_OPERATOR, action, target, detail=detail)

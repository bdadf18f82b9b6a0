"""Operators' tokens: 256 random bits, shown once, kept as their SHA-256.

Source: docs/CONTROL.md §6.
"""

import hashlib
import secrets
import uuid
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.store.schema import Token
from replication.control.role import OperatorRole
from replication.errors import ConflictError, NotFoundError

PREFIX = "us_"
DAYS_MAX = 365
DAYS_DEFAULT = 90
_RANDOM_BYTES = 32
_DAY_NS = 86400 * 10**9


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was just made, and the only time that its secret is told."""

    row: Token
    secret: str


async def create_token(
    session: AsyncSession, name: str, role: OperatorRole, *, days: int, now_ns: int, created_by: str
) -> NewToken:
    """Make a token. One that is expired or revoked gives its name up.

    Raises ConflictError when the name is in use.
    """
    row = await session.scalar(select(Token).where(Token.name == name))
    if row is not None:
        if row.revoked_ns is None and row.expires_ns > now_ns:
            raise ConflictError(
                f"there is a token {name}", hint="choose another name, or revoke that one first"
            )
        await session.delete(row)
        await session.flush()
    secret = PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    row = Token(
        id=uuid.uuid4(),
        name=name,
        role=role,
        digest=digest_of(secret),
        created_ns=now_ns,
        created_by=created_by,
        expires_ns=now_ns + days * _DAY_NS,
        revoked_ns=None,
    )
    session.add(row)
    await session.flush()
    return NewToken(row, secret)


async def revoke_token(session: AsyncSession, name: str, *, now_ns: int) -> None:
    """Make a token worthless from now on; fine if it is already.

    Raises NotFoundError.
    """
    row = await session.scalar(select(Token).where(Token.name == name))
    if row is None:
        raise NotFoundError(f"there is no token {name}", hint="list them: GET tokens")
    if row.revoked_ns is None:
        row.revoked_ns = now_ns


def digest_of(token: str) -> str:
    """What is stored of a token. It is random and long: a slow hash would protect nothing more."""
    return hashlib.sha256(token.encode()).hexdigest()

"""What a job does when the database does not do as it is asked: it waits, for a while.

Source: docs/CONTROL.md §9.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from replication.errors import ConflictError, IntegrityError, ReplicationError

DATABASE_RETRY_SECONDS = 1.0
DATABASE_RETRIES_MAX = 3600
"""A job outlives a database that is away for an hour; then the sweep takes it up again."""

CONFLICTS_MAX = 3
"""How often a transaction is begun anew that contradicts what another one wrote meanwhile."""

T = TypeVar("T")


async def patiently(job_id: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """The database may be away for a while; what another one wrote first is read anew."""
    conflicts = 0
    for _ in range(DATABASE_RETRIES_MAX):
        try:
            return await attempt()
        except ReplicationError as error:
            conflicts += isinstance(error, ConflictError)
            if not error.retryable and not 0 < conflicts <= CONFLICTS_MAX:
                raise
            structlog.get_logger().warning("a job waits", job=job_id, reason=str(error))
        await asyncio.sleep(DATABASE_RETRY_SECONDS)
    return await attempt()


def is_the_database_s(error: Exception) -> bool:
    """Whether the database is away or damaged: then it is no defect of the job."""
    return isinstance(error, IntegrityError) or (
        isinstance(error, ReplicationError) and error.retryable
    )

"""Trying again until it works: the cache may be away for as long as it likes."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

from appliance.process_server.measures import Measures
from daemon.service import Health
from replication.errors import StorageError, UnavailableError

BACKOFF_SECONDS_MIN = 0.25
BACKOFF_SECONDS_MAX = 8.0
HEALTH_PART = "cache"

R = TypeVar("R")


class Persistence:
    """Repeats a request to the cache with growing pauses, and tells the health why."""

    def __init__(self, health: Health, measures: Measures) -> None:
        self._health = health
        self._measures = measures

    async def insist(self, request: Callable[[], Awaitable[R]]) -> R:
        """The result of ``request``, tried until the cache neither is away nor refuses."""
        pause = BACKOFF_SECONDS_MIN
        while True:
            try:
                result = await request()
            except (UnavailableError, StorageError) as error:
                self._measures.upload_retries.inc()
                self._health.report(HEALTH_PART, warning=str(error))
            else:
                self._health.report(HEALTH_PART)
                return result
            await asyncio.sleep(pause * (0.5 + secrets.randbelow(1001) / 2000))
            pause = min(2 * pause, BACKOFF_SECONDS_MAX)

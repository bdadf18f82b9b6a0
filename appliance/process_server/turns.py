"""Whose body is read next: so many at once over all machines, and so many of each."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from appliance.process_server.config import LimitConfig
from appliance.process_server.refusal import Kind, RefusedError
from replication.bookmark import MachineId


@dataclass(slots=True)
class _Queue:
    """One machine's.

    present: requests that have a turn or wait for one.
    """

    turns: asyncio.Semaphore
    present: int = 0


class Turns:
    """First come, first served; no machine has more than its number in the common queue."""

    def __init__(self, limits: LimitConfig) -> None:
        self._limits = limits
        self._all = asyncio.Semaphore(limits.segments_in_flight_max)
        self._queues: dict[MachineId, _Queue] = {}

    @contextlib.asynccontextmanager
    async def take(self, machine: MachineId) -> AsyncIterator[None]:
        """Wait for a turn, and have it. Raises RefusedError (quota) when too many wait."""
        queue = self._queues.get(machine)
        if queue is None:
            queue = self._queues[machine] = _Queue(
                asyncio.Semaphore(self._limits.machine_turns_max)
            )
        if queue.present >= self._limits.machine_turns_max + self._limits.machine_waiting_max:
            raise RefusedError(
                Kind.QUOTA,
                f"{queue.present} requests of machine {machine} are under way or wait already",
                hint="send fewer at once: send.segments_in_flight_max of the agent",
            )
        queue.present += 1
        try:
            async with queue.turns, self._all:
                yield
        finally:
            queue.present -= 1
            if not queue.present:
                del self._queues[machine]

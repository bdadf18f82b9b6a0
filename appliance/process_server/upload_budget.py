"""How many uploads, and how many bytes of them in memory, may be on their way at once."""

import asyncio
import contextlib
from collections.abc import AsyncIterator


class UploadBudget:
    """First come, first served, over all machines. What is larger than the budget goes alone."""

    def __init__(self, count_max: int, bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._count = 0
        self._bytes = 0
        self._queue = asyncio.Lock()
        self._freed = asyncio.Event()

    async def take(self, size_bytes: int) -> None:
        """Wait for a place; ``give_back`` it."""
        async with self._queue:
            while self._count and not self._fits(size_bytes):
                self._freed.clear()
                await self._freed.wait()
            self._count += 1
            self._bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self._count -= 1
        self._bytes -= size_bytes
        assert self._count >= 0
        assert self._bytes >= 0
        self._freed.set()

    @contextlib.asynccontextmanager
    async def place(self, size_bytes: int) -> AsyncIterator[None]:
        await self.take(size_bytes)
        try:
            yield
        finally:
            self.give_back(size_bytes)

    def _fits(self, size_bytes: int) -> bool:
        return self._count < self._count_max and self._bytes + size_bytes <= self._bytes_max

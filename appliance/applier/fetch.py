"""Segments from the cache, in parallel, never more of them in memory than a window allows."""

import asyncio
import contextlib
from collections import deque

import xxhash

from appliance.applier.cache_account import CacheAccount
from replication.manifest import SegmentEntry


class ByteWindow:
    """Bytes and fetches that may be under way at once; first come, first served.

    One for all machines of the daemon: its memory does not grow with them.
    """

    def __init__(self, bytes_max: int, count_max: int) -> None:
        self._bytes = bytes_max
        self._bytes_max = bytes_max
        self._count = count_max
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def enter(self, size_bytes: int) -> None:
        """Wait for room for ``size_bytes``; whoever has it gives it back with ``leave``."""
        assert size_bytes <= self._bytes_max
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size_bytes, turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(size_bytes)
            else:
                with contextlib.suppress(ValueError):  # an admission has passed it over already
                    self._waiting.remove((size_bytes, turn))
                self._admit()
            raise

    def leave(self, size_bytes: int) -> None:
        self._bytes += size_bytes
        self._count += 1
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._count and self._waiting[0][0] <= self._bytes:
            size_bytes, turn = self._waiting.popleft()
            if turn.cancelled():
                continue
            self._bytes -= size_bytes
            self._count -= 1
            turn.set_result(None)


async def fetch_segment(
    account: CacheAccount, container: str, name: str, entry: SegmentEntry
) -> bytes | None:
    """A segment as the manifest describes it; None when it is not there."""
    return await account.read(container, name, entry.size_bytes)


def is_intact(segment: bytes, entry: SegmentEntry) -> bool:
    """Whether the bytes are those that the manifest names."""
    return len(segment) == entry.size_bytes and xxhash.xxh3_128_digest(segment) == entry.digest

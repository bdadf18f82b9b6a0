"""All machines' streams, and the room that they share."""

import asyncio
from collections.abc import Callable

from appliance.process_server.cache_account import CacheAccount
from appliance.process_server.cache_history import read_history
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.room import Reservation, Room
from appliance.process_server.segment_file import AttemptId
from appliance.process_server.spool import Spool
from appliance.process_server.stream import OpenAttempt, Stream
from replication.bookmark import MachineId


class Streams:
    """Finds a machine's stream, and makes it at first contact.

    on_new: called with each stream that comes into being.
    """

    def __init__(
        self,
        spool: Spool,
        room: Room,
        disk: DiskThreads,
        cache: CacheAccount,
        on_new: Callable[[Stream], None],
    ) -> None:
        self.room = room
        self.disk = disk
        self.spool = spool
        self._cache = cache
        self._on_new = on_new
        self._streams: dict[MachineId, Stream] = {}
        self._learning: dict[MachineId, asyncio.Lock] = {}

    async def restore(self) -> None:
        """Take over what the spool holds; call once, before anything else."""
        for stored in await self.disk.run(self.spool.load):
            stream = Stream(stored.machine, self.spool, self.room, self.disk)
            await stream.restore(stored)
            self._add(stream)

    async def find(self, machine: MachineId) -> Stream:
        """The stream of ``machine``, with a position that can be relied on.

        Raises UnavailableError when it can only be learnt from the cache, which is away.
        """
        stream = self._streams.get(machine)
        if stream is not None and stream.known:
            return stream
        async with self._learning.setdefault(machine, asyncio.Lock()):
            stream = self._streams.get(machine)
            if stream is None or not stream.known:
                history = await read_history(self._cache, machine)
                stream = stream or Stream(machine, self.spool, self.room, self.disk)
                await stream.learn(history)
                if machine not in self._streams:
                    self._add(stream)
            return stream

    async def reserve(self, stream: Stream, attempt: AttemptId, size_bytes: int) -> Reservation:
        """Room for a segment, if need be at the cost of attempts that lead nowhere.

        Raises RefusedError (spool_full).
        """
        if not self.room.fits(size_bytes):
            await stream.abandon(stream.dead_beside(attempt))
        if not self.room.fits(size_bytes) and self._is_stuck(stream, attempt):
            await self._abandon_youngest(stream)
        return self.room.reserve(size_bytes)

    @property
    def all(self) -> tuple[Stream, ...]:
        return tuple(self._streams.values())

    def _is_stuck(self, stream: Stream, attempt: AttemptId) -> bool:
        """Whether no attempt can be finished, and ``attempt`` is the one that should be.

        Nothing is committed, so nothing drains: several machines have filled the spool with
        halves. The one that began first goes on, and others have to begin again.
        """
        mine = stream.attempts.get((attempt.stamp, attempt.attempt))
        return (
            mine is not None
            and not any(one.unapplied for one in self.all)
            and all(mine.began <= one.began for _, one in self._open_attempts())
        )

    async def _abandon_youngest(self, spared: Stream) -> None:
        others = [(stream, one) for stream, one in self._open_attempts() if stream is not spared]
        if others:
            stream, youngest = max(others, key=lambda pair: pair[1].began)
            await stream.abandon([youngest])

    def _open_attempts(self) -> list[tuple[Stream, OpenAttempt]]:
        return [(stream, one) for stream in self.all for one in stream.attempts.values()]

    def _add(self, stream: Stream) -> None:
        self._streams[stream.machine] = stream
        self._on_new(stream)

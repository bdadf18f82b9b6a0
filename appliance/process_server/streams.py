"""All machines' streams, and the room that they share: no machine takes what others need."""

import asyncio
from collections.abc import Callable

from appliance.process_server.address import SumsAddress
from appliance.process_server.cache_account import CacheAccount
from appliance.process_server.cache_history import read_history
from appliance.process_server.changeset import OpenAttempt
from appliance.process_server.config import LimitConfig
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.refusal import Kind, RefusedError
from appliance.process_server.room import Reservation, Room
from appliance.process_server.segment_file import AttemptId
from appliance.process_server.spool import Spool
from appliance.process_server.stream import Stream
from replication.bookmark import MachineId


class Streams:
    """Finds a machine's stream, and makes it at first contact.

    on_new:   called with each stream that comes into being.
    expected: how many machines are known to send; 0 when that is not known.
    """

    def __init__(
        self,
        spool: Spool,
        room: Room,
        disk: DiskThreads,
        cache: CacheAccount,
        *,
        limits: LimitConfig,
        on_new: Callable[[Stream], None],
        expected: Callable[[], int] = lambda: 0,
    ) -> None:
        self.room = room
        self.disk = disk
        self.spool = spool
        self._cache = cache
        self._limits = limits
        self._on_new = on_new
        self._expected = expected
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
                ledger, watermark = await read_history(self._cache, machine)
                stream = stream or Stream(machine, self.spool, self.room, self.disk)
                await stream.learn(ledger)
                stream.watermark = watermark
                if machine not in self._streams:
                    self._add(stream)
            return stream

    async def reserve(self, stream: Stream, attempt: AttemptId, size_bytes: int) -> Reservation:
        """Room for a segment, if need be at the cost of attempts that lead nowhere.

        Raises RefusedError: quota or spool_full while waiting helps, too_large when it does not.
        """
        bytes_max = self.part_of(stream)
        if not (
            self.room.fits(size_bytes)
            and stream.room.fits(size_bytes, bytes_max)
            and self._attempts_fit(stream, attempt, size_bytes, bytes_max)
        ):
            await stream.abandon(stream.dead_beside(attempt))
        self._check_attempts(stream, attempt, size_bytes, bytes_max)
        if not self.room.fits(size_bytes) and self._is_stuck(stream, attempt):
            await self._abandon_youngest(stream)
        return stream.room.reserve(size_bytes, bytes_max)

    def part_of(self, stream: Stream) -> int:
        """Bytes that a machine may fill: the whole room while no other one is known."""
        is_alone = self._expected() <= 1 and all(one is stream for one in self.all)
        share = 1.0 if is_alone else self._limits.machine_spool_share_max
        return int(self.room.bytes_max * share)

    def _attempts_fit(
        self, stream: Stream, attempt: AttemptId, size_bytes: int, bytes_max: int
    ) -> bool:
        try:
            self._check_attempts(stream, attempt, size_bytes, bytes_max)
        except RefusedError:
            return False
        return True

    def _check_attempts(
        self, stream: Stream, attempt: AttemptId, size_bytes: int, bytes_max: int
    ) -> None:
        """Raise RefusedError when a machine has begun too much that it has not committed."""
        limits = self._limits
        mine = stream.attempts.get((attempt.stamp, attempt.attempt))
        if mine is None and len(stream.attempts) >= limits.machine_attempts_max:
            raise RefusedError(
                Kind.QUOTA,
                f"{len(stream.attempts)} changesets of machine {stream.machine} are begun and not "
                "committed",
                hint="commit one of them, or begin with the lowest number again",
            )
        most = min(limits.machine_attempt_bytes_max, bytes_max)
        if mine is not None and mine.size_bytes + size_bytes > most:
            raise RefusedError(
                Kind.TOO_LARGE,
                f"{attempt} has {mine.size_bytes} bytes already; it may have {most}",
                hint="lower capture.changeset_bytes_max of the agent, or raise spool.bytes_max or "
                "limits.machine_attempt_bytes_max of the process server",
            )
        begun_bytes = sum(one.size_bytes for one in stream.attempts.values())
        if begun_bytes + size_bytes > limits.machine_attempt_bytes_max:
            raise RefusedError(
                Kind.QUOTA,
                f"changesets of machine {stream.machine} that are not committed have {begun_bytes} "
                f"bytes; they may have {limits.machine_attempt_bytes_max}",
                hint="commit one of them",
            )

    async def sums(self, address: SumsAddress) -> bytes:
        """A part of the sums of a machine's state, sealed as it lies in the cache.

        Raises RefusedError (not_found) while there is none.
        """
        found = await self._cache.sums(
            address.machine, address.generation, address.disk, address.level, address.part
        )
        if found is None:
            raise RefusedError(
                Kind.NOT_FOUND,
                f"the cache has no part {address.part} of the sums of level {address.level} of "
                f"disk {address.disk} in generation {address.generation}",
                hint="the applier puts them when it has closed the generation before: ask again",
            )
        return found

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

"""What is known of one machine's stream: in memory, changed on the event loop alone.

An attempt grows by segments until a manifest commits it; it is then a changeset, which is uploaded
and stays until the applier's watermark has passed it. Disk writes go first, memory follows; the
lock keeps what makes and removes folders of a machine apart.
"""

import asyncio
import itertools
import time
from collections.abc import Iterable, Iterator

from appliance.process_server.changeset import Changeset, OpenAttempt
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.order import Position, Verdict, judge_commit, judge_segment
from appliance.process_server.refusal import Kind, RefusedError
from appliance.process_server.room import MachineRoom, Reservation, Room
from appliance.process_server.segment_file import AttemptId, Segment, SegmentFile
from appliance.process_server.spool import Ledger, Spool, StoredAttempt, StoredMachine
from replication.bookmark import MachineId, Stamp
from replication.errors import OutOfOrderError, PeerError
from replication.manifest import Manifest, SegmentEntry
from replication.stream import StreamState
from replication.watermark import Watermark

MISSING_TOLD_MAX = 8
_order = itertools.count()


class Stream:
    """One machine's stream.

    known:     whether the ledger is there, so that ``position`` can be relied on.
    attempts:  not committed, by stamp and attempt.
    held:      committed and not yet pruned, by stamp, ascending.
    committed: set at each commit, for whoever waits for something to watch over.
    moved:     set when there is more to upload, or more is uploaded.
    """

    def __init__(self, machine: MachineId, spool: Spool, room: Room, disk: DiskThreads) -> None:
        self.machine = machine
        self.spool = spool
        self.lock = asyncio.Lock()
        self.known = False
        self.position = Position()
        self.durable_ns = 0
        self.watermark = Watermark(machine)
        self.attempts: dict[tuple[Stamp, bytes], OpenAttempt] = {}
        self.held: dict[Stamp, Changeset] = {}
        self.committed = asyncio.Event()
        self.moved = asyncio.Event()
        self.room = MachineRoom(room)
        self._disk = disk
        self._written: Ledger | None = None

    async def restore(self, stored: StoredMachine) -> None:
        """Take over what a start found, and drop what does not count any more."""
        if stored.ledger is not None:
            self.known, self._written = True, stored.ledger
            self.position, self.durable_ns = stored.ledger.position, stored.ledger.durable_ns
        manifested = [one for one in stored.attempts if one.manifest is not None]
        for one in sorted(manifested, key=lambda one: one.id.stamp):
            assert one.manifest is not None
            self._hold(one.id, one.segments, one.manifest, one.manifest_digest, one.manifest_bytes)
            self.held[one.id.stamp].committed_ns = one.began
            if one.id.stamp > self.position.committed:
                self.position = self.position.after_commit(one.manifest, one.manifest_digest)
        for one in sorted(stored.attempts, key=lambda one: one.began):
            if one.manifest is None:
                self._reopen(one)
        await self._prune()
        await self._drop(self._superseded())

    async def learn(self, ledger: Ledger) -> None:
        """Take what the cache knows for a machine of which no ledger is here, and write one."""
        found = self.position
        if ledger.position.committed > found.committed:
            found = ledger.position
        durable_ns = max(self.durable_ns, ledger.durable_ns)
        await self._write(Ledger(found, durable_ns))
        self.position, self.durable_ns, self.known = found, durable_ns, True

    def state(self) -> StreamState:
        return StreamState(
            committed=self.position.committed,
            attempt=self.position.attempt,
            durable_ns=self.durable_ns,
            time_ns=time.time_ns(),
            watermark=self.watermark,
        )

    def find_segment(self, attempt: AttemptId, index: int) -> Segment | None:
        """A segment that is here already; OutOfOrderError when it could not be used any more."""
        held = self.held.get(attempt.stamp)
        if held is not None and held.id == attempt and index < len(held.segments):
            return held.segments[index]
        judge_segment(self.position, attempt.stamp)
        opened = self.attempts.get((attempt.stamp, attempt.attempt))
        return opened.segments.get(index) if opened else None

    async def place(
        self, attempt: AttemptId, file: SegmentFile, segment: Segment, reserved: Reservation
    ) -> bool:
        """Give a finished segment its place, durably; False when the same one is there.

        Raises RefusedError (conflict) when other bytes are there.
        """
        async with self.lock:
            there = self.find_segment(attempt, segment.index)
            if there is None:
                key = (attempt.stamp, attempt.attempt)
                if key not in self.attempts:
                    await self._disk.run(self.spool.make_attempt, attempt)
                    self.attempts[key] = OpenAttempt(attempt, next(_order))
                await self._disk.run(self.spool.place, attempt, file, segment)
                self.attempts[key].segments[segment.index] = segment
                reserved.keep()
        if there is not None:
            refuse_other_bytes(there, segment.digest)
        # Whoever sees the segment in memory syncs before saying so: outside the lock, since a
        # commit, which relies on all of them, syncs the folder itself.
        await self._disk.run(self.spool.sync, attempt)
        self.moved.set()
        return there is None

    async def commit(self, manifest: Manifest, content: bytes, digest: bytes) -> Verdict:
        """Acknowledge a changeset for good.

        Raises OutOfOrderError when it does not follow or a segment of it is missing, PeerError
        when its segments are not those that the manifest lists.
        """
        async with self.lock:
            held = self.held.get(manifest.stamp)
            if held is not None and held.manifest_digest == digest:
                return Verdict.REPEATED
            if judge_commit(self.position, manifest, digest) is Verdict.REPEATED:
                return Verdict.REPEATED
            attempt = AttemptId(self.machine, manifest.stamp, manifest.attempt)
            key = (attempt.stamp, attempt.attempt)
            opened = self.attempts.get(key) or OpenAttempt(attempt, next(_order))
            segments = _match(manifest, opened)
            if key not in self.attempts:
                await self._disk.run(self.spool.make_attempt, attempt)
            await self._disk.run(self.spool.write_manifest, attempt, content)
            self.attempts.pop(key, None)
            for surplus in opened.segments.values():
                self.room.give_back(surplus.size_bytes)
            held = self._hold(attempt, segments, manifest, digest, len(content))
            held.uploads = opened.uploads  # what goes ahead is on its way in the attempt's name
            self.position = self.position.after_commit(manifest, digest)
            await self._drop(self._superseded())
        self.committed.set()
        self.moved.set()
        return Verdict.FOLLOWS

    async def advance(self, watermark: Watermark) -> None:
        """Take note of the applier's watermark and drop what it has passed."""
        self.watermark = watermark
        async with self.lock:
            position = self.position.after_applied(watermark.applied)
            if position != self.position:
                await self._write(Ledger(position, self.durable_ns))
                self.position = position
                await self._prune()

    async def fall_back(self) -> None:
        """Something acknowledged is lost here and in the cache: go back to what is applied.

        The agent sends all that changed since, as a new changeset; what is held of the lost ones'
        successors could never be applied and goes. What was durable is only what the applier has.
        """
        async with self.lock:
            watermark = self.watermark
            if watermark.applied >= self.position.committed or self.leads_on(watermark.applied):
                return
            position = self.position.fallen_back(watermark.applied, watermark.attempt)
            durable_ns = min(self.durable_ns, watermark.restorable_ns)
            await self._write(Ledger(position, durable_ns))
            self.position, self.durable_ns = position, durable_ns
            for stamp in list(self.held):
                await self._drop_held(stamp)

    async def end(self) -> None:
        """The machine is not protected any more: let go of all that is not applied.

        The position stays, on the disk first: a number that was acknowledged is never used again,
        should the machine come back: on a full disk, what frees room without a word in the ledger
        goes first. Raises StorageError; what is left is for another try.
        """
        async with self.lock:
            await self._drop(list(self.attempts.values()))
            held = sorted(self.held)
            for stamp in held[:-1]:  # the newest one's manifest says the position after a crash
                await self._drop_held(stamp)
            if held and (self._written is None or self._written.position != self.position):
                await self._write(Ledger(self.position, self.durable_ns))
            for stamp in held[-1:]:
                await self._drop_held(stamp)

    async def abandon(self, attempts: Iterable[OpenAttempt]) -> None:
        """Give the room of uncommitted attempts back."""
        async with self.lock:
            await self._drop([one for one in attempts if one in self.attempts.values()])

    def dead_beside(self, attempt: AttemptId) -> list[OpenAttempt]:
        """Attempts that their agent must have given up, since ``attempt`` began after them.

        An agent begins changesets in order and works at one attempt of each, so an older attempt
        at the same or a later changeset belongs to a run of the agent that has ended.
        """
        mine = self.attempts.get((attempt.stamp, attempt.attempt))
        began = mine.began if mine else next(_order)
        return [
            one
            for one in self.attempts.values()
            if one.began < began
            and (
                one.id.stamp >= attempt.stamp or one.id.stamp.generation < attempt.stamp.generation
            )
        ]

    def leads_on(self, applied: Stamp) -> bool:
        """Whether something is held that can be applied next, so that nothing is lost for good."""
        reached = {applied.generation: applied.number}
        return any(
            stamp > applied and one.since <= reached.get(stamp.generation, 0)
            for stamp, one in self.held.items()
        )

    def holds(self, changeset: Changeset) -> bool:
        """Whether it is this one that is held: another may have its stamp after a fall back."""
        return self.held.get(changeset.stamp) is changeset

    def has(self, one: Changeset | OpenAttempt) -> bool:
        """Whether it is this one that is under way or held, also if it was committed meanwhile."""
        held = self.held.get(one.id.stamp)
        opened = self.attempts.get((one.id.stamp, one.id.attempt))
        return any(found is not None and found.uploads is one.uploads for found in (held, opened))

    @property
    def unapplied(self) -> bool:
        return bool(self.held)

    def _hold(
        self,
        attempt: AttemptId,
        segments: Iterable[Segment],
        manifest: Manifest,
        digest: bytes,
        manifest_bytes: int,
    ) -> Changeset:
        changeset = Changeset(
            id=attempt,
            segments=tuple(segments),
            since=manifest.since,
            time_ns=manifest.bookmark.time_ns,
            manifest_bytes=manifest_bytes,
            manifest_digest=digest,
        )
        for segment in changeset.segments:
            self.room.take(segment.size_bytes)
        self.room.take(manifest_bytes)
        self.held[attempt.stamp] = changeset
        return changeset

    def _reopen(self, stored: StoredAttempt) -> None:
        opened = OpenAttempt(stored.id, next(_order))
        for segment in stored.segments:
            opened.segments[segment.index] = segment
            self.room.take(segment.size_bytes)
        self.attempts[(stored.id.stamp, stored.id.attempt)] = opened

    async def _write(self, ledger: Ledger) -> None:
        await self._disk.run(self.spool.write_ledger, self.machine, ledger)
        self._written = ledger

    async def _prune(self) -> None:
        """Drop what is applied. The ledger on disk must say so by now."""
        for stamp in [stamp for stamp in self.held if stamp <= self.position.applied]:
            await self._drop_held(stamp)

    async def _drop_held(self, stamp: Stamp) -> None:
        changeset = self.held.pop(stamp)
        await self._disk.run(self.spool.drop, changeset.id)
        for segment in changeset.segments:
            self.room.give_back(segment.size_bytes)
        self.room.give_back(changeset.manifest_bytes)

    def _superseded(self) -> list[OpenAttempt]:
        newest = self.position.committed
        return [one for one in self.attempts.values() if one.id.stamp <= newest]

    async def _drop(self, attempts: Iterable[OpenAttempt]) -> None:
        for one in attempts:
            del self.attempts[(one.id.stamp, one.id.attempt)]
            await self._disk.run(self.spool.drop, one.id)
            for segment in one.segments.values():
                self.room.give_back(segment.size_bytes)


def refuse_other_bytes(there: Segment, digest: bytes) -> None:
    """Raise RefusedError (conflict) unless ``there`` has ``digest``."""
    if there.digest != digest:
        raise RefusedError(
            Kind.CONFLICT,
            f"segment {there.index} is here with other bytes: {there.digest.hex()}, "
            f"not {digest.hex()}",
            hint="an attempt's segments never change: begin a new attempt",
        )


def _match(manifest: Manifest, opened: OpenAttempt) -> list[Segment]:
    """The segments that a manifest lists, in order, all of them here."""
    missing = [i for i in range(len(manifest.segments)) if i not in opened.segments]
    if missing:
        told = ", ".join(map(str, missing[:MISSING_TOLD_MAX]))
        more = ", …" if len(missing) > MISSING_TOLD_MAX else ""
        raise OutOfOrderError(
            f"{opened.id} lacks {len(missing)} of {len(manifest.segments)} segments: {told}{more}",
            hint="send them, then commit again",
        )
    found = []
    frames = 0
    for index, entry in enumerate(manifest.segments):
        segment = opened.segments[index]
        there = SegmentEntry(segment.frame_count, segment.size_bytes, segment.digest)
        if there != entry or segment.first_frame != frames:
            raise PeerError(
                f"segment {index} of {opened.id} has {there.frame_count} frames from "
                f"{segment.first_frame}, {there.size_bytes} bytes, {there.digest.hex()}; the "
                f"manifest says {entry.frame_count} from {frames}, {entry.size_bytes}, "
                f"{entry.digest.hex()}"
            )
        frames += entry.frame_count
        found.append(segment)
    return found


def held_in_order(stream: Stream) -> Iterator[Changeset]:
    """The changesets that are not applied, oldest first."""
    yield from (stream.held[stamp] for stamp in sorted(stream.held))

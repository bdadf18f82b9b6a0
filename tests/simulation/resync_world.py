"""A machine, an appliance and stores that go through resyncs, unkindly: see the test beside it."""

import random

from agents.mobility.bookkeeping import (
    begin_resync,
    end_comparison,
    finish,
    learn_applied,
    make_pending,
    note_compared,
    reopen,
    require_resync,
    settle,
)
from agents.mobility.reconcile import believed
from agents.mobility.resync_stage import Stage
from agents.mobility.stream_state import BlockSets, Pending, StreamStateFile, merge
from appliance.applier.resync_record import ResyncRecord
from appliance.applier.succession import Apply, Gap, Idle, follow
from appliance.process_server.order import Position, judge_commit
from replication.block_set import BlockSet
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from replication.control.report import ResyncCause
from replication.envelope import new_attempt
from replication.errors import OutOfOrderError
from replication.manifest import NO_BASIS, Manifest
from replication.stream import StreamState
from replication.watermark import Watermark, WatermarkKey
from tests.simulation.resync_store import Changeset, Store
from tests.simulation.test_stream_survives import BLOCK_COUNT, IDENTITY, MACHINE, PART_BLOCKS

KEY = WatermarkKey(bytes(32), MACHINE)
CHUNK = 4
LOST_AFTER = 6
"""Looks in vain after which the applier calls the stream lost."""

DAMAGED = -1


class World:
    def __init__(self, folder: str, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        # The machine: what is on its disk, what is on its way there, what the kernel has marked.
        self.source = [0] * BLOCK_COUNT
        self.version = 0
        self.flying: dict[int, int] = {}
        self.marks = BlockSet(BLOCK_COUNT)
        self.carried = BlockSet(BLOCK_COUNT)
        self.fresh_pins = True
        # The appliance.
        self.server = Position()
        self.spool: dict[Stamp, Changeset] = {}
        self.cache: dict[Stamp, Changeset] = {}
        self.unsynced: list[Stamp] = []
        self.sums: tuple[Stamp, bytes, tuple[int, ...]] | None = None
        # The second site.
        self.store = Store(f"{folder}/a")
        self.other: Store | None = None
        self.backup: Store | None = None
        self.vain = 0
        self.published = NO_BASIS
        self.said = Watermark(MACHINE).signed(KEY)
        self.watermark = self.said
        self.old_watermark = self.said
        self.checked = 0
        self.resyncs = 0
        self.tampered = False
        self.agent = StreamStateFile(f"{folder}/agent", MACHINE)
        self.server_copy: tuple[Position, dict[Stamp, Changeset]] | None = None
        self.machine_copy: tuple[list[int], dict[int, int], BlockSet, BlockSet, bool] | None = None
        self.connect()

    # The machine.

    def write(self) -> None:
        for _ in range(self.rng.randint(1, 4)):
            block = self.rng.randrange(BLOCK_COUNT)
            self.version += 1
            self.marks.add_run(block, 1)
            if self.rng.random() < 0.4:
                self.flying[block] = self.version
            else:
                self.flying.pop(block, None)
                self.source[block] = self.version

    def land(self, *, everything: bool = False) -> None:
        """Writes end; most ends are seen, and mark once more."""
        for block in list(self.flying):
            if everything or self.rng.random() < 0.5:
                self.source[block] = self.flying.pop(block)
                if self.rng.random() < 0.8:
                    self.marks.add_run(block, 1)

    def in_flight(self) -> BlockSet:
        found = BlockSet(BLOCK_COUNT)
        for block in self.flying:
            found.add_run(block, 1)
        return found

    def absorb(self) -> None:
        """Swap, make durable, forget: what is under way counts to both epochs."""
        swapped = self.marks | self.carried
        self.carried = self.in_flight()
        merge(self.agent.todo, {0: swapped})
        self.agent.save()
        self.marks.clear()
        self.fresh_pins = False

    def peek_running(self) -> BlockSet:
        return self.marks | self.carried

    # The agent.

    def restart_agent(self) -> None:
        self.carried = BlockSet(BLOCK_COUNT)  # in the process's memory
        self.agent = StreamStateFile(f"{self.folder}/agent", MACHINE)
        if self.fresh_pins:
            require_resync(self.agent, ResyncCause.TRACKING_LOST, "tracking was lost")
        self.connect()

    def reboot(self) -> None:
        """A power cut: trackers go, and what happens before the next ones run is not marked."""
        for block, version in self.flying.items():
            if self.rng.random() < 0.5:
                self.source[block] = version
        self.flying.clear()
        self.marks.clear()
        for _ in range(self.rng.randint(0, 3)):
            self.version += 1
            self.source[self.rng.randrange(BLOCK_COUNT)] = self.version
        self.fresh_pins = True
        self.restart_agent()

    def order(self) -> None:
        position = self.agent.position
        under_way = position.stage is Stage.SENDING or not (position.seeded or position.resync)
        if not under_way:
            require_resync(
                self.agent,
                ResyncCause.OPERATOR,
                "ordered",
                ordered=True,
                request=position.resync_request + 1,
            )

    def state(self) -> StreamState:
        told = StreamState(self.server.committed, self.server.attempt, 0, 0, self.watermark)
        return believed(told, KEY)[0]

    def connect(self) -> None:
        stream = self.state()
        settle(self.agent, stream, {0: BLOCK_COUNT}, {0: IDENTITY})
        learn_applied(self.agent, stream.watermark.applied)

    def turn(self, dies_at: int = 0) -> None:
        """What the agent does next; it dies before step ``dies_at`` (0: never)."""
        position = self.agent.position
        if position.pending is not None:
            return self.connect()
        stream = self.state()
        learn_applied(self.agent, stream.watermark.applied)
        ours = Stamp(position.generation, position.committed)
        used = Stamp(position.generation, max(position.committed, position.used))
        told = stream.watermark
        if stream.committed < ours or told.lost or told.applied > used:
            self.connect()
        stage = self.agent.position.stage
        if stage is Stage.REQUIRED:
            begin_resync(self.agent, self.state(), {0: BLOCK_COUNT}, {0: IDENTITY})
            self.resyncs += 1
        elif stage is Stage.COMPARING:
            self.compare(dies_at)
        else:
            self.changeset(dies_at)
        return None

    def compare(self, dies_at: int) -> None:
        position = self.agent.position
        if position.since == 0:
            self.absorb()
            if dies_at == 1:
                return self.restart_agent()
            return self.send({0: BlockSet(BLOCK_COUNT)}, dies_at, whole=False, resync=True)
        watermark = self.state().watermark
        begun = Stamp(position.generation, position.committed)
        if watermark.applied != begun or watermark.sums == NO_BASIS:
            behind = watermark.applied < begun
            if behind and not watermark.is_blank and self.rng.random() < 0.03:
                reopen(self.agent)
            return None
        basis = watermark.sums
        resync = position.resync
        assert resync is not None
        cursor = resync.cursor if position.basis == basis else 0
        while cursor < BLOCK_COUNT:
            if self.sums is None or self.sums[:2] != (begun, basis):
                return None  # the cache has lost them: later
            theirs = self.sums[2]
            found = BlockSet(BLOCK_COUNT)
            end = min(cursor + CHUNK, BLOCK_COUNT)
            if tuple(self.source[cursor:end]) != theirs[cursor:end]:
                found.add_run(cursor, end - cursor)
            cursor = end
            note_compared(self.agent, basis, {0: found}, cursor)
            if self.rng.random() < 0.3:  # the machine goes on meanwhile, and so may others
                self.write()
                self.land()
            if dies_at and self.rng.random() < 0.2:
                return self.restart_agent()
            if self.rng.random() < 0.15:
                return None  # the rest in another turn, with what has changed by then
        watermark = self.state().watermark
        if (watermark.applied, watermark.sums) == (begun, basis):
            end_comparison(self.agent)
        if dies_at == 4:
            self.restart_agent()
        return None

    def changeset(self, dies_at: int) -> None:
        self.absorb()
        if dies_at == 1:
            return self.restart_agent()
        todo = self.agent.todo[0]
        whole = len(todo) <= PART_BLOCKS or self.rng.random() < 0.5
        if not whole:
            part = todo.first(PART_BLOCKS)
            return self.send({0: part - self.peek_running()}, dies_at, whole=False, carries=part)
        if self.rng.random() < 0.2:
            # It could not be brought to one instant.
            return self.send({0: todo - self.peek_running()}, dies_at, whole=True, carries=todo)
        self.land(everything=True)  # frozen: nothing is on its way
        sent = todo | self.peek_running()
        return self.send({0: sent}, dies_at, whole=True, carries=sent, exact=True)

    def send(
        self,
        sent: BlockSets,
        dies_at: int,
        *,
        whole: bool,
        carries: BlockSet | None = None,
        exact: bool = False,
        resync: bool = False,
    ) -> None:
        position = self.agent.position
        blocks = [] if carries is None else [b for run in carries.runs() for b in _blocks(run)]
        content = {block: self.source[block] for block in blocks}
        stamp = position.next_stamp
        manifest = Manifest(
            machine=MACHINE,
            bookmark=Bookmark(stamp, 0, Consistency.CRASH if exact else Consistency.NONE),
            since=position.since,
            attempt=new_attempt(),
            disks=(DiskShape(0, "disk", BLOCK_COUNT * 4096),),
            segments=(),
            changed_bytes=0,
            captured_ns=0,
            initial=resync or (not position.seeded and not whole),
            applied=position.applied,
            resync=resync,
            basis=NO_BASIS if resync else position.basis,
            origin=position.origin,
        )
        # ``sent`` is taken as it was: what is written from here on is marked for the next.
        pending = Pending(stamp, manifest.attempt, whole)
        make_pending(self.agent, pending, {0: sent[0].copy()}, audit_chunk=0)
        if dies_at == 2:
            return self.restart_agent()
        try:
            self.commit(Changeset(manifest, content, tuple(self.source)))
        except OutOfOrderError:
            return self.connect()
        if dies_at == 3:
            return self.restart_agent()
        finish(self.agent)
        if dies_at == 4:
            return self.restart_agent()
        return None

    # The process server and the cache.

    def commit(self, changeset: Changeset) -> None:
        manifest = changeset.manifest
        judge_commit(self.server, manifest, manifest.attempt)
        self.server = self.server.after_commit(manifest, manifest.attempt)
        self.spool[manifest.stamp] = changeset

    def upload(self) -> None:
        for stamp in sorted(self.spool):
            if stamp not in self.cache:
                self.cache[stamp] = self.spool[stamp]
                self.unsynced.append(stamp)
                return

    def prune(self) -> None:
        applied = self.watermark.applied  # whoever wrote it: the process server cannot tell
        self.server = self.server.after_applied(applied)
        self.spool = {s: kept for s, kept in self.spool.items() if s > self.server.applied}
        everywhere = {**self.cache, **self.spool}
        found = follow(self.store.head, {s: c.manifest.since for s, c in everywhere.items()})
        if isinstance(found, Gap | Idle) and self.server.committed > self.store.head:
            genuine = self.said.applied
            if self.server.committed > genuine:
                self.server = self.server.fallen_back(genuine, self.said.attempt)
                self.spool.clear()

    def lose_spool(self) -> None:
        self.spool.clear()
        self.server, reached = Position(), self.watermark.applied
        for stamp, one in sorted(self.cache.items()):
            since = one.manifest.since
            follows = since <= (reached.number if stamp.generation == reached.generation else 0)
            if stamp > reached and follows:
                self.server, reached = Position(stamp, one.manifest.attempt), stamp
        self.server = self.server.after_applied(self.watermark.applied)

    def crash_cache(self) -> None:
        for stamp in self.unsynced[self.rng.randint(0, len(self.unsynced)) :]:
            self.cache.pop(stamp, None)
        self.unsynced.clear()
        self.watermark = self.old_watermark
        if self.rng.random() < 0.5:
            self.sums = None

    def settle_cache(self) -> None:
        self.unsynced.clear()
        self.old_watermark = self.watermark

    def forge(self) -> None:
        """Somebody writes a watermark into the cache, or puts an older one back."""
        generation, number = self.agent.position.generation, self.agent.position.committed
        plausible = Stamp(generation, self.rng.randint(0, number + 1))
        absurd = Stamp(generation + self.rng.randint(0, 2), self.rng.randint(0, 50))
        forged = Watermark(
            MACHINE,
            applied=plausible if self.rng.random() < 0.7 else absurd,
            attempt=new_attempt(),
            lost="so it is said" if self.rng.random() < 0.3 else "",
            lost_generation=generation,
            sums=new_attempt(),
        )
        old = self.rng.random() < 0.3
        self.watermark = (
            self.old_watermark if old else forged.signed(WatermarkKey(b"x" * 32, MACHINE))
        )

    # The second site.

    def apply(self) -> None:
        store = self.store
        found = follow(store.head, {s: c.manifest.since for s, c in self.readable().items()})
        if not isinstance(found, Apply):
            self.vain = self.vain + 1 if isinstance(found, Gap) else 0
            return self.publish()
        changeset = self.cache[found.stamp]
        manifest = changeset.manifest
        if manifest.resync:
            store.record.begin(manifest.stamp, manifest.attempt)
            if self.rng.random() < 0.2:
                return None  # killed before it is sealed
        elif not store.record.fits(manifest, store.head):
            self.refused.add(manifest.attempt)
            self.vain = LOST_AFTER
            return self.publish()
        else:
            store.record.note_origin(manifest, store.head)
            if self.rng.random() < 0.1:
                store.record = ResyncRecord(store.folder)
                return None  # killed before it is sealed
        for block, version in changeset.content.items():
            store.target[block] = version
        store.head, store.attempt = manifest.stamp, manifest.attempt
        self.vain = 0
        if manifest.bookmark.consistency.restorable and not manifest.initial:
            kept = [
                (here, there)
                for here, there in zip(store.target, changeset.snapshot, strict=True)
                if here != DAMAGED
            ]
            assert all(here == there for here, there in kept), f"{found.stamp}: not its bookmark"
            self.checked += 1
        if self.rng.random() < 0.8:
            self.publish()
        return None

    refused: set[bytes]

    def readable(self) -> dict[Stamp, Changeset]:
        return {s: c for s, c in self.cache.items() if c.manifest.attempt not in self.refused}

    def publish_sums(self) -> None:
        store = self.store
        begun = store.record.at(store.head, store.attempt)
        self.published = NO_BASIS
        if begun is not None:
            # What is damaged matches nothing.
            self.sums = (store.head, begun.basis, tuple(store.target))
            self.published = begun.basis
        self.publish()

    def publish(self) -> None:
        store = self.store
        begun = store.record.at(store.head, store.attempt)
        lost = self.vain >= LOST_AFTER
        newest = max([store.head, *(s for s in self.cache)])
        same = begun is not None and begun.basis == self.published
        self.said = Watermark(
            MACHINE,
            applied=store.head,
            attempt=store.attempt,
            lost="blobs did not come" if lost else "",
            lost_generation=newest.generation if lost else 0,
            sums=self.published if same else NO_BASIS,
        ).signed(KEY)
        self.watermark = self.said

    def rot(self) -> None:
        """A block goes bad, is noticed, and an operator orders a resync."""
        self.store.target[self.rng.randrange(BLOCK_COUNT)] = DAMAGED
        self.order()

    def go_well(self) -> None:
        """For a moment everybody does what he should."""
        for _ in range(self.rng.randint(1, 6)):
            self.turn()
            self.upload()
            self.apply()
            self.publish_sums()

    def come_to_rest(self) -> None:
        self.land(everything=True)
        for step in range(2500):
            self.turn()
            self.land(everything=True)
            for _ in range(3):
                self.upload()
                self.apply()
            if self.rng.random() < 0.5:
                self.publish_sums()
            if step % 3 == 0:
                self.publish()
            self.prune()
            if DAMAGED in self.store.target and step % 200 == 100:
                self.order()
            if step > 60 and self.is_at_rest():
                return

    def is_at_rest(self) -> bool:
        position = self.agent.position
        return (
            position.resync is None
            and position.seeded
            and not self.agent.todo[0]
            and not self.marks
            and DAMAGED not in self.store.target
            and self.store.head == Stamp(position.generation, position.committed)
            and self.store.target == self.source
        )


def _blocks(run: tuple[int, int]) -> range:
    return range(run[0], run[0] + run[1])

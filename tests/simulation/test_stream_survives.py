"""Agent's memory, process server's order and applier's succession, against faults from a seed.

The decisions are the real ones (bookkeeping, reconcile, order, succession); disks, spool, cache
and store are dictionaries, so that thousands of histories run in seconds. The invariants:

- whatever the applier holds after a consistent changeset equals the source at its bookmark;
- in the end, everything at rest, it equals the source;
- no history needs a new generation while at most one of the three memories is lost at a time.
"""

import random
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from agents.mobility.bookkeeping import (
    drop_pending,
    finish,
    learn_applied,
    make_pending,
    settle,
)
from agents.mobility.device import DeviceIdentity
from agents.mobility.stream_state import Pending, StreamStateFile, merge
from appliance.applier.succession import Apply, follow
from appliance.process_server.order import Position, judge_commit
from replication.block_set import BlockSet
from replication.bookmark import NOTHING, Bookmark, Consistency, DiskShape, Stamp
from replication.envelope import new_attempt
from replication.errors import OutOfOrderError
from replication.manifest import Manifest
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Watermark
from tests.simulation.histories import histories

_OTHERS = ("lose segments", "drop applied")
BLOCK_COUNT = 40
PART_BLOCKS = 8
MACHINE = uuid.UUID(int=7)
IDENTITY = DeviceIdentity("boot", "7:0", 1, BLOCK_COUNT * 4096, "")


@dataclass(frozen=True)
class Changeset:
    manifest: Manifest
    content: dict[int, int]
    snapshot: tuple[int, ...]


@dataclass
class World:
    folder: str
    rng: random.Random
    source: list[int] = field(default_factory=lambda: [0] * BLOCK_COUNT)
    version: int = 0
    tracker: BlockSet = field(default_factory=lambda: BlockSet(BLOCK_COUNT))
    server: Position = field(default_factory=Position)
    spool: dict[Stamp, Changeset] = field(default_factory=dict)
    cache: dict[Stamp, Changeset] = field(default_factory=dict)
    halves: set[Stamp] = field(default_factory=set)
    fresh: list[Stamp] = field(default_factory=list)
    watermark: Watermark = field(default_factory=lambda: Watermark(MACHINE))
    old_watermark: Watermark = field(default_factory=lambda: Watermark(MACHINE))
    head: Stamp = NOTHING
    head_attempt: bytes = NO_ATTEMPT
    target: list[int] = field(default_factory=lambda: [0] * BLOCK_COUNT)
    checked: int = 0

    def __post_init__(self) -> None:
        self.agent = StreamStateFile(self.folder, MACHINE)
        self.connect()

    # The machine and its agent.

    def write(self) -> None:
        for _ in range(self.rng.randint(1, 4)):
            block = self.rng.randrange(BLOCK_COUNT)
            self.version += 1
            self.source[block] = self.version
            self.tracker.add_run(block, 1)

    def restart_agent(self) -> None:
        self.agent = StreamStateFile(self.folder, MACHINE)
        self.connect()

    def connect(self) -> None:
        stream = self.state()
        settle(self.agent, stream, {0: BLOCK_COUNT}, {0: IDENTITY})
        learn_applied(self.agent, stream.watermark.applied)

    def state(self) -> StreamState:
        return StreamState(self.server.committed, self.server.attempt, 0, 0, self.watermark)

    def changeset(self, dies_at: int) -> None:
        """Take and commit a changeset; the agent dies before step ``dies_at`` (0: never)."""
        merge(self.agent.todo, {0: self.tracker})
        self.agent.save()
        self.tracker.clear()
        if dies_at == 1:
            return self.restart_agent()
        todo = self.agent.todo[0]
        whole = len(todo) <= PART_BLOCKS or self.rng.random() < 0.5
        part = todo.copy() if whole else todo.first(PART_BLOCKS)
        content = {block: self.source[block] for run in part.runs() for block in _blocks(run)}
        position = self.agent.position
        stamp = position.next_stamp
        consistency = Consistency.CRASH if whole else Consistency.NONE
        manifest = Manifest(
            machine=MACHINE,
            bookmark=Bookmark(stamp, 0, consistency),
            since=position.since,
            attempt=new_attempt(),
            disks=(DiskShape(0, "disk", BLOCK_COUNT * 4096),),
            segments=(),
            changed_bytes=0,
            captured_ns=0,
            applied=position.applied,
        )
        changeset = Changeset(manifest, content, tuple(self.source))
        pending = Pending(stamp, manifest.attempt, whole)
        make_pending(self.agent, pending, {0: part}, audit_chunk=0)
        if dies_at == 2:
            return self.restart_agent()
        try:
            self.commit(changeset)
        except OutOfOrderError:
            return self.connect()
        if dies_at == 3:
            return self.restart_agent()
        finish(self.agent)
        if dies_at == 4:
            return self.restart_agent()
        learn_applied(self.agent, self.watermark.applied)
        return None

    # The process server and the cache.

    def commit(self, changeset: Changeset) -> None:
        manifest = changeset.manifest
        digest = manifest.attempt
        judge_commit(self.server, manifest, digest)
        self.server = self.server.after_commit(manifest, digest)
        self.spool[manifest.stamp] = changeset

    def upload(self) -> None:
        """Put what is in the spool and not in the cache, oldest first."""
        for stamp in sorted(self.spool):
            if stamp > self.watermark.applied and stamp not in self.whole():
                self.cache[stamp] = self.spool[stamp]
                self.halves.discard(stamp)
                self.fresh.append(stamp)
                return

    def whole(self) -> dict[Stamp, Changeset]:
        """What of the cache has all its segments."""
        return {stamp: one for stamp, one in self.cache.items() if stamp not in self.halves}

    def prune(self) -> None:
        applied = self.watermark.applied
        self.server = self.server.after_applied(applied)
        self.spool = {stamp: kept for stamp, kept in self.spool.items() if stamp > applied}
        if self._gap_is_for_good():
            self.server = self.server.fallen_back(applied, self.watermark.attempt)
            self.spool.clear()
        if self.server.committed < Stamp(self.agent.position.generation, self.agent.position.since):
            self.connect()

    def _gap_is_for_good(self) -> bool:
        """The applier asks for something that neither the cache nor the spool has."""
        everywhere = {**self.whole(), **self.spool}
        found = follow(self.head, {s: c.manifest.since for s, c in everywhere.items()})
        return not isinstance(found, Apply) and self.server.committed > self.head

    def lose_spool(self) -> None:
        self.spool.clear()
        self.server, reached = Position(), self.watermark.applied
        for stamp, one in sorted(self.whole().items()):
            if stamp > reached and one.manifest.since <= reached.number:
                self.server, reached = Position(stamp, one.manifest.attempt), stamp
        self.server = self.server.after_applied(self.watermark.applied)
        self.connect()

    def crash_cache(self) -> None:
        """The cache forgets what it was given last, and goes back to an older watermark."""
        forgotten = self.fresh[self.rng.randint(0, len(self.fresh)) :]
        for stamp in forgotten:
            self.cache.pop(stamp, None)
        self.fresh.clear()
        self.watermark = self.old_watermark

    def settle_cache(self) -> None:
        """What the cache holds is on its disk now."""
        self.fresh.clear()
        self.old_watermark = self.watermark

    def drop_applied(self) -> None:
        """Nothing in the cache tells of what is applied any more, but the watermark."""
        self.cache = {stamp: one for stamp, one in self.cache.items() if stamp > self.head}

    def lose_segments(self) -> None:
        """The cache forgets segments whose manifest it keeps."""
        if self.fresh:
            self.halves.add(self.rng.choice(self.fresh))

    # The applier.

    def apply(self) -> None:
        # A changeset that lacks segments is passed over once they have been asked for in vain.
        found = follow(self.head, {s: c.manifest.since for s, c in self.whole().items()})
        if not isinstance(found, Apply):
            return
        changeset = self.cache[found.stamp]
        assert found.stamp > self.head
        for block, version in changeset.content.items():
            self.target[block] = version
        self.head, self.head_attempt = found.stamp, changeset.manifest.attempt
        if changeset.manifest.bookmark.consistency.restorable:
            assert tuple(self.target) == changeset.snapshot, f"{found.stamp} is not its bookmark"
            self.checked += 1
        self.publish()

    def publish(self) -> None:
        self.watermark = replace(self.watermark, applied=self.head, attempt=self.head_attempt)

    def come_to_rest(self) -> None:
        for _ in range(400):
            if self.agent.position.pending is not None:
                self.connect()
            if any(self.agent.todo.values()) or self.tracker or not self.agent.position.seeded:
                self.changeset(0)
            self.upload()
            self.apply()
            self.publish()
            self.prune()
            learn_applied(self.agent, self.watermark.applied)
        assert self.head >= self.server.committed


def _blocks(run: tuple[int, int]) -> range:
    return range(run[0], run[0] + run[1])


def _play(folder: str, seed: int, faults: list[str], steps: int = 120) -> World:
    world = World(folder, random.Random(seed))
    rng = world.rng
    for _ in range(steps):
        action = rng.choices(
            ["write", "changeset", "die", "upload", "apply", "prune", "settle", *faults],
            [6, 5, 2, 5, 5, 3, 2, *([1] * len(faults))],
        )[0]
        match action:
            case "write":
                world.write()
            case "changeset":
                world.changeset(0)
            case "die":
                world.changeset(rng.randint(1, 4))
            case "upload":
                world.upload()
            case "apply":
                world.apply()
            case "prune":
                world.prune()
            case "settle":
                world.settle_cache()
            case "lose spool":
                world.settle_cache()  # one loss at a time: the cache is sound meanwhile
                world.lose_spool()
            case "crash cache":
                world.crash_cache()
            case "lose segments":
                world.lose_segments()
            case "drop applied":
                world.drop_applied()
            case "lose both":
                world.crash_cache()
                world.lose_spool()
            case "restart":
                world.restart_agent()
    world.come_to_rest()
    return world


@pytest.fixture
def folder() -> Iterator[str]:
    """In memory: what is tried here is the order of writes, not the disk's patience."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


@pytest.mark.parametrize("seed", histories(60, 150))
def test_every_history_ends_equal_without_a_new_generation(seed: int, folder: str) -> None:
    world = _play(folder, seed, ["lose spool", "crash cache", "restart", *_OTHERS])
    assert world.target == world.source
    assert world.agent.position.generation == 1
    assert world.checked > 0
    assert not world.agent.retained()


@pytest.mark.parametrize("seed", histories(60, 150))
def test_every_history_ends_equal_when_spool_and_cache_are_lost_together(
    seed: int, folder: str
) -> None:
    world = _play(folder, seed, ["lose spool", "crash cache", "lose both", "restart", *_OTHERS])
    assert world.target == world.source
    assert world.checked > 0


def test_a_pending_commit_that_was_not_taken_is_dropped(folder: str) -> None:
    world = World(folder, random.Random(1))
    world.changeset(0)
    world.write()
    world.changeset(2)
    assert world.agent.position.pending is None
    assert world.agent.todo[0]
    assert world.agent.position.committed == 1
    drop = replace(world.agent.position, pending=Pending(Stamp(1, 2), new_attempt(), whole=True))
    world.agent.position = drop
    drop_pending(world.agent)
    assert world.agent.position.pending is None

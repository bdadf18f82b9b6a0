"""A machine's store together with plain images of every position: what views must equal."""

from __future__ import annotations

import random
import uuid
from typing import TYPE_CHECKING

from appliance.applier.store import MachineStore
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from appliance.applier.store import ReaderStore

BLOCK = 4096
MACHINE = uuid.UUID(int=7)
SECOND_NS = 1_000_000_000
START_NS = 1_795_000_000 * SECOND_NS


class RecordedMachine:
    """Applies random changesets to a store and to images in memory."""

    def __init__(self, root: str, seed: int = 1, sizes: tuple[int, ...] = (64, 33)) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.sizes = {disk: blocks * BLOCK for disk, blocks in enumerate(sizes)}
        self.images: dict[int, dict[int, bytes]] = {}
        self.position = 0
        self.generation = 1
        self.number = 0
        self.attempt = b"a" * 16

    def open(self) -> MachineStore:
        return MachineStore.open(self.root, MACHINE, name="web-01")

    def shapes(self) -> list[DiskShape]:
        return [DiskShape(disk, f"sd{disk}", size) for disk, size in self.sizes.items()]

    def resize(self, disk: int, blocks: int, tail_bytes: int = 0) -> None:
        self.sizes[disk] = blocks * BLOCK + tail_bytes

    def apply(
        self,
        store: MachineStore,
        *,
        writes: int = 12,
        consistency: Consistency = Consistency.CRASH,
        time_ns: int | None = None,
    ) -> int:
        """One changeset of random writes and zeros, told to the store in any order."""
        before = self.images.get(self.position, {})
        images = {}
        for disk, size in self.sizes.items():
            blocks = -(-size // BLOCK)
            old = before.get(disk, b"")[: blocks * BLOCK]
            images[disk] = bytearray(old.ljust(blocks * BLOCK, b"\0"))
        calls = []
        for order in range(writes):
            disk = self.random.choice(list(self.sizes))
            blocks = len(images[disk]) // BLOCK
            block = self.random.randrange(blocks)
            count = self.random.randint(1, min(9, blocks - block))
            data = self.random.randbytes(count * BLOCK)
            is_zero = self.random.random() < 0.3
            images[disk][block * BLOCK : (block + count) * BLOCK] = (
                bytes(count * BLOCK) if is_zero else data
            )
            calls.append((disk, block, count, order, b"" if is_zero else data))
        self.random.shuffle(calls)
        with store.begin() as writer:
            for disk, block, count, order, data in calls:
                if not data:
                    writer.zero(disk, block, count, order)
                else:
                    writer.write(disk, block, order, data)
            self.number += 1
            stamp = Stamp(self.generation, self.number)
            at = START_NS + self.number * 60 * SECOND_NS if time_ns is None else time_ns
            bookmark = Bookmark(stamp, at, consistency, "why" if writes else "")
            # Known before the store is asked: a crash may come after it was made durable.
            self.images[self.position + 1] = {d: bytes(image) for d, image in images.items()}
            self.position = writer.seal(bookmark, self.number - 1, self.attempt, self.shapes())
        return self.position


def content(store: MachineStore | ReaderStore, position: int) -> Mapping[int, bytes]:
    """All disks of a position, read whole blocks at a time and once by its data runs."""
    found = {}
    point = next(p for p in store.chain().points if p.position == position)
    for shape in point.disks:
        with store.open_view(position, shape.index) as view:
            data = view.read(0, view.size_bytes)
            assert len(data) == shape.size_bytes == view.size_bytes
            sparse = bytearray(view.size_bytes)
            for run in view.extents():
                if run.is_data:
                    sparse[run.offset : run.offset + run.length] = view.read(run.offset, run.length)
            assert sparse == data
            found[shape.index] = data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")
    return found


def assert_equals_images(store: MachineStore | ReaderStore, machine: RecordedMachine) -> None:
    """Every position that the store shows has the content that was recorded for it."""
    for point in store.chain().points:
        assert content(store, point.position) == machine.images[point.position], point.position

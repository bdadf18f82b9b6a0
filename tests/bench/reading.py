"""Reading recovery points: through FUSE, opening views, merging layers."""

import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from appliance.applier.store import MachineStore
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp
from tests.bench import plain
from tests.bench.figure import AtLeast, AtMost, Row, spread
from tests.bench.place import GIB, MIB, Place

BLOCK_BYTES = 4096
PIECE_BYTES = MIB
FRAME_BLOCKS = 256
LAYER_COUNT = 50
MOUNT_SECONDS_MAX = 20.0
READ_SECONDS = 3.0
_MACHINE = uuid.UUID(int=1)
_SERVE = """
import sys
from appliance.applier.points_fuse import serve_points
serve_points(sys.argv[1], sys.argv[2])
"""


class Writing:
    """A store under construction: one disk, changesets one after another."""

    def __init__(self, root: Path, size_bytes: int) -> None:
        self.store = MachineStore.open(str(root), _MACHINE, name="bench")
        self._shape = DiskShape(0, "disk", size_bytes)
        self._number = 0

    def seal(self, runs: Sequence[tuple[int, int]]) -> int:
        """A changeset of random data in ``runs`` (block, count); the position."""
        self._number += 1
        with self.store.begin() as writer:
            for order, at in enumerate(range(0, len(runs), FRAME_BLOCKS)):
                part = runs[at : at + FRAME_BLOCKS]
                size_bytes = sum(count for _, count in part) * BLOCK_BYTES
                writer.write_extents(0, part, order, os.urandom(size_bytes))
            bookmark = Bookmark(Stamp(1, self._number), time.time_ns(), Consistency.CRASH)
            return writer.seal(bookmark, self._number - 1, os.urandom(16), [self._shape])


@contextlib.contextmanager
def writing(where: Place, size_bytes: int) -> Iterator[Writing]:
    """A new store for the time of the context."""
    made = Writing(where.folder / f"store-{uuid.uuid4().hex}", size_bytes)
    try:
        yield made
    finally:
        made.store.close()


def measure_reading(where: Place) -> list[Row]:
    """A point through FUSE after 50 layers of random 4 KiB changes: in order, and at random."""
    size_bytes = (1 if where.quick else 4) * GIB
    blocks = size_bytes // BLOCK_BYTES
    where.need_bytes(2 * size_bytes)
    rng = random.Random(1)
    in_order, at_random, plain_order, plain_random = [], [], [], []
    with writing(where, size_bytes) as made:
        whole = [(block, 1) for block in range(blocks)]
        position = made.seal(whole)
        made.store.fold_to(position)
        for _ in range(LAYER_COUNT):
            changed = sorted(rng.sample(range(blocks), blocks // 100))
            made.seal([(block, 1) for block in changed])
        root = Path(made.store.folder).parents[1]
        base = Path(made.store.folder) / "disks" / "0" / "base.img"
        made.store.close()
        with _mounted(root, where.folder / "points") as mount:
            image = mount / "bench" / "latest" / "disk0.img"
            _read_in_order(image)  # the files beneath are in the page cache from here on
            _read_in_order(base)
            for _ in range(2 if where.quick else 5):
                where.rest()
                in_order.append(_read_in_order(image) / 1e6)
                plain_order.append(_read_in_order(base) / 1e6)
                at_random.append(_read_at_random(image, rng))
                plain_random.append(_read_at_random(base, rng))
    name = f"point after {LAYER_COUNT} layers through FUSE"
    return [
        Row(
            figure=f"{name}, in order",
            unit="MB/s",
            target=AtLeast(500),
            measured=statistics.median(in_order),
            limit=statistics.median(plain_order),
            limit_is="pread of base.img, as cached",
            note=spread(in_order),
        ),
        Row(
            figure=f"{name}, random 4 KiB",
            unit="reads/s",
            target=AtLeast(8000),
            measured=statistics.median(at_random),
            limit=statistics.median(plain_random),
            limit_is="pread of base.img, as cached",
            note=spread(at_random),
        ),
    ]


@contextlib.contextmanager
def _mounted(root: Path, mount: Path) -> Iterator[Path]:
    """All points of the store as files, served by a process of its own as the applier does it."""
    mount.mkdir()
    server = subprocess.Popen([sys.executable, "-c", _SERVE, str(root), str(mount)])
    try:
        deadline = time.monotonic() + MOUNT_SECONDS_MAX
        while not (mount / "bench" / "latest" / "disk0.img").exists():
            assert server.poll() is None, "the points' server ended"
            assert time.monotonic() < deadline, "the points were not mounted in time"
            time.sleep(0.05)
        yield mount
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        subprocess.run(["fusermount3", "-uzq", mount], check=False, capture_output=True)


def _read_in_order(path: Path) -> float:
    """Bytes a second; what the kernel has cached of this file is dropped first if it is FUSE's."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(fd).st_size
        _forget(path, fd)
        began = time.monotonic()
        buffer = bytearray(PIECE_BYTES)
        at = 0
        while at < size_bytes:
            at += os.preadv(fd, [buffer], at)
        return size_bytes / (time.monotonic() - began)
    finally:
        os.close(fd)


def _read_at_random(path: Path, rng: random.Random) -> float:
    """Reads of 4 KiB a second, one after another."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        blocks = os.fstat(fd).st_size // BLOCK_BYTES
        _forget(path, fd)
        count, began = 0, time.monotonic()
        while time.monotonic() - began < READ_SECONDS:
            for _ in range(64):
                os.pread(fd, BLOCK_BYTES, rng.randrange(blocks) * BLOCK_BYTES)
            count += 64
        return count / (time.monotonic() - began)
    finally:
        os.close(fd)


def _forget(path: Path, fd: int) -> None:
    if path.name != "base.img":
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def measure_views(where: Place) -> list[Row]:
    """Opening a view of a 64 GiB disk with 1 million extents."""
    count, layers = (100_000, 2) if where.quick else (1_000_000, 10)
    blocks = 64 * GIB // BLOCK_BYTES
    where.need_bytes(count * BLOCK_BYTES + 2 * GIB)
    step = blocks // count
    took, limits = [], []
    with writing(where, 64 * GIB) as made:
        position = 0
        for layer in range(layers):
            runs = [(block, 1) for block in range(layer * step // layers, blocks, step * layers)]
            position = made.seal(_spread_over(runs, count // layers))
        rows = made.store.chain().layers
        extents = sum(row.extent_count for row in rows)
        for _ in range(3 if where.quick else 7):
            where.rest()
            took.append(_seconds(lambda: made.store.open_view(position, 0).close()))
            limits.append(_seconds(lambda: _read_sections(Path(made.store.folder), count)))
    return [
        Row(
            figure=f"open a view of 64 GiB with {extents:,} extents in {layers} layers",
            unit="s",
            target=AtMost(1.0),
            measured=statistics.median(took),
            limit=statistics.median(limits),
            limit_is="pread of the bytes of indexes and digests alone",
            note=spread(took),
        )
    ]


def _spread_over(runs: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    assert len(runs) >= count
    return runs[:count]


def _read_sections(folder: Path, count: int) -> None:
    """As many bytes as ``count`` extents have in indexes and digests, from the layers' ends."""
    left = count * 40
    for path in sorted((folder / "layers").iterdir()):
        with path.open("rb") as file:
            size_bytes = min(left, path.stat().st_size)
            file.seek(-size_bytes, os.SEEK_END)
            left -= len(file.read())


def measure_merging(where: Place) -> list[Row]:
    """Merging two layers of 20,000 extents each."""
    blocks = 16 * GIB // BLOCK_BYTES
    rng = random.Random(2)
    took, limits = [], []
    merged = 0
    for _ in range(2 if where.quick else 7):
        with writing(where, 16 * GIB) as made:
            for _ in range(2):
                chosen = sorted(rng.sample(range(blocks // 2), 20_000))
                made.seal([(2 * block, 1) for block in chosen])
            where.rest()
            took.append(_seconds(lambda: made.store.merge(1, 2)))
            merged = made.store.chain().layers[0].extent_count
            size_bytes = merged * BLOCK_BYTES // MIB * MIB
            limits.append(size_bytes / plain.write_and_sync(where.folder, size_bytes))
    return [
        Row(
            figure=f"merge two layers of 20,000 extents ({merged:,} left)",
            unit="s",
            target=AtMost(0.5),
            measured=statistics.median(took),
            limit=statistics.median(limits),
            limit_is="one writer, the same bytes with fsync",
            note=spread(took),
        )
    ]


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began

"""Compare three ways to keep recovery points: XFS clones, btrfs snapshots, layers.

Each way gets the same image and the same random 4 KiB writes between snapshots; told are the time
that the writes and the snapshot take and the space that a snapshot costs. Needs root for the
file systems' loop mounts. Run it as ``python -m tests.bench.store_alternatives``.

Source: docs/adr/0001-layered-store.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appliance.applier.store import MachineStore
from replication.bookmark import Bookmark, Consistency, DiskShape, Stamp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 4096
IMAGE_BYTES = 1 << 30
FILE_SYSTEM_BYTES = 3 << 30
SNAPSHOTS = 10
WRITES = 2500
FICLONE = 0x40049409
FRAME_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Result:
    """Per snapshot: seconds of the writes and of the snapshot; bytes that it costs."""

    way: str
    write_seconds: list[float]
    snapshot_seconds: list[float]
    snapshot_bytes: int

    def row(self) -> str:
        return (
            f"{self.way:28} {statistics.median(self.write_seconds):8.2f}"
            f" {max(self.write_seconds):8.2f} {statistics.median(self.snapshot_seconds):9.3f}"
            f" {max(self.snapshot_seconds):9.3f} {self.snapshot_bytes / (1 << 20):9.1f}"
        )


def blocks_of_round(nth: int) -> list[int]:
    return random.Random(nth).sample(range(IMAGE_BYTES // BLOCK), WRITES)


@contextlib.contextmanager
def mounted(folder: str, *make: str) -> Iterator[str]:
    """A new file system in a file, mounted."""
    image, mount = os.path.join(folder, "fs.img"), os.path.join(folder, "fs")
    os.mkdir(mount)
    with open(image, "wb") as file:
        file.truncate(FILE_SYSTEM_BYTES)
    subprocess.run([*make, image], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def fill(path: str) -> None:
    with open(path, "wb") as file:
        file.writelines(os.urandom(1 << 20) for _ in range(IMAGE_BYTES >> 20))
        os.fsync(file.fileno())


def used_bytes(mount: str) -> int:
    os.sync()
    found = os.statvfs(mount)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def measure(way: str, mount: str, image: str, snapshot: Callable[[int], None]) -> Result:
    before = used_bytes(mount)
    writes, snapshots = [], []
    payload = os.urandom(BLOCK)
    for nth in range(SNAPSHOTS):
        start = time.monotonic()
        fd = os.open(image, os.O_WRONLY)
        for block in blocks_of_round(nth):
            os.pwrite(fd, payload, block * BLOCK)
        os.fsync(fd)
        os.close(fd)
        writes.append(time.monotonic() - start)
        start = time.monotonic()
        snapshot(nth)
        snapshots.append(time.monotonic() - start)
    return Result(way, writes, snapshots, (used_bytes(mount) - before) // SNAPSHOTS)


def xfs(folder: str) -> Result:
    with mounted(folder, "mkfs.xfs", "-q", "-m", "reflink=1") as mount:
        image = os.path.join(mount, "disk.img")
        fill(image)

        def clone(nth: int) -> None:
            source = os.open(image, os.O_RDONLY)
            target = os.open(os.path.join(mount, f"{nth}.img"), os.O_WRONLY | os.O_CREAT, 0o600)
            fcntl.ioctl(target, FICLONE, source)
            os.fsync(target)
            os.close(target)
            os.close(source)

        clone(SNAPSHOTS)  # the first writes after it already copy
        return measure("XFS FICLONE", mount, image, clone)


def btrfs(folder: str) -> Result:
    with mounted(folder, "mkfs.btrfs", "-q") as mount:
        live = os.path.join(mount, "live")
        subprocess.run(["btrfs", "-q", "subvolume", "create", live], check=True)
        image = os.path.join(live, "disk.img")
        fill(image)

        def snapshot(nth: int) -> None:
            target = os.path.join(mount, str(nth))
            command = ["btrfs", "-q", "subvolume", "snapshot", "-r", live, target]
            subprocess.run(command, check=True)
            subprocess.run(["btrfs", "filesystem", "sync", mount], check=True)

        snapshot(SNAPSHOTS)
        return measure("btrfs subvolume snapshot", mount, image, snapshot)


def layers(folder: str) -> Result:
    disks = [DiskShape(0, "disk", IMAGE_BYTES)]
    attempt = bytes(16)
    writes, snapshots = [], []
    with MachineStore.open(folder, uuid.UUID(int=1)) as store:
        with store.begin() as writer:
            for block in range(0, IMAGE_BYTES // BLOCK, FRAME_BLOCKS):
                writer.write(0, block, block, os.urandom(FRAME_BLOCKS * BLOCK))
            writer.seal(Bookmark(Stamp(1, 1), 1, Consistency.CRASH), 0, attempt, disks)
        store.fold_to(1)
        payload = os.urandom(FRAME_BLOCKS * BLOCK)
        for nth in range(SNAPSHOTS):
            start = time.monotonic()
            with store.begin() as writer:
                blocks = blocks_of_round(nth)
                for at in range(0, WRITES, FRAME_BLOCKS):
                    part = [(block, 1) for block in blocks[at : at + FRAME_BLOCKS]]
                    writer.write_extents(0, part, at, payload[: len(part) * BLOCK])
                writes.append(time.monotonic() - start)
                start = time.monotonic()
                bookmark = Bookmark(Stamp(1, nth + 2), nth + 2, Consistency.CRASH)
                writer.seal(bookmark, nth + 1, attempt, disks)
                snapshots.append(time.monotonic() - start)
        size_bytes = sum(row.size_bytes for row in store.chain().layers) // SNAPSHOTS
    return Result("layers (seal is the snapshot)", writes, snapshots, size_bytes)


def main() -> int:
    heading = (
        f"{'way':28} {'writes s':>8} {'worst':>8} {'snapshot':>9} {'worst':>9} {'MiB each':>9}"
    )
    sys.stdout.write(heading + "\n")
    for way in (xfs, btrfs, layers):
        with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
            sys.stdout.write(way(folder).row() + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

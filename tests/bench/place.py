"""Where a benchmark works: a folder of its own, and everything in it gone afterwards."""

import contextlib
import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from replication.errors import StorageError
from tests.e2e.disk import Disk, run
from tests.e2e.rig import Rig

MIB = 1 << 20
GIB = 1 << 30
PATTERN_BYTES = 256 * MIB
SPARE_BYTES = 4 * GIB
_FICLONERANGE = 0x4020940D
_CLONE_RANGE = struct.Struct("<qQQQ")


class Place:
    """A folder for one benchmark.

    quick: small sizes and few repeats, to see that everything works.
    rest:  seconds of rest between two runs, for whoever else is on the machine.
    """

    def __init__(self, folder: Path, *, quick: bool, rest: float) -> None:
        self.folder = folder
        self.quick = quick
        self._rest = rest

    def rest(self) -> None:
        """Let others have the machine for a moment."""
        time.sleep(self._rest)

    def need_bytes(self, size_bytes: int) -> None:
        """Raise StorageError unless there is room for so much, and some to spare."""
        free = shutil.disk_usage(self.folder).free
        if free < size_bytes + SPARE_BYTES:
            raise StorageError(
                f"{self.folder} has {free / GIB:.0f} GiB free, {size_bytes / GIB:.0f} are needed",
                hint="TMPDIR names another folder, --quick needs less",
            )

    @contextlib.contextmanager
    def rig(self, **settings: dict[str, Any]) -> Iterator[Rig]:
        """A machine and its second site as they come: every setting has its default.

        settings: per part, laid over that; ``process_server`` stands for "process-server".
        """
        folder = Path(tempfile.mkdtemp(prefix="rig-", dir=self.folder))
        rig = Rig(folder)
        rig.settings = {
            "agent": {
                "capture": {
                    "interval_seconds": 5.0,
                    "heartbeat_seconds": 60.0,
                    "pause_share_max": 0.01,
                },
                "send": {"backoff_seconds_max": 15.0},
                "service": {"log_level": "info"},
            },
            "process-server": {
                "spool": {"bytes_max": 8 * GIB},
                "cache": {
                    "watermark_seconds": 1.0,
                    "watermark_idle_seconds": 5.0,
                    "recheck_seconds": 5.0,
                },
                "service": {"log_level": "info"},
            },
            "applier": {
                "sweep_seconds": 5.0,
                "wake_seconds": 1.0,
                "reask_seconds": 10.0,
                "service": {"log_level": "info"},
            },
        }
        for name, tree in settings.items():
            part = rig.settings[name.replace("_", "-")]
            for section, values in tree.items():
                part[section] = part.get(section, {}) | values
        try:
            yield rig
        finally:
            rig.clean_up()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def place(parent: str | None, *, quick: bool, rest: float) -> Iterator[Place]:
    """A new folder below ``parent`` (a temporary one by default), removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="understudy-bench-", dir=parent))
    try:
        yield Place(folder, quick=quick, rest=rest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_random(path: Path, size_bytes: int) -> None:
    """Fill the beginning of a file with bytes that do not compress; they stay in the page cache."""
    with path.open("r+b") as file:
        for at in range(0, size_bytes, MIB):
            file.write(os.urandom(min(MIB, size_bytes - at)))


def write_compressible(path: Path, size_bytes: int) -> None:
    """Fill with bytes of which half is random, so that they shrink to about half."""
    half = bytes(range(64)) * 32
    with path.open("r+b") as file:
        for at in range(0, size_bytes, MIB):
            count = min(MIB, size_bytes - at) // 4096
            file.write(b"".join(os.urandom(2048) + half for _ in range(count)))


class ClonedDisk(Disk):
    """A disk of data that does not compress, made at once: an XFS file that repeats one pattern.

    The pattern is longer than any frame, and each frame has its own key stream, so to whoever
    replicates it the repetition does not show. It takes PATTERN_BYTES of room.
    """

    def __init__(self, folder: Path, index: int, size_bytes: int) -> None:
        super().__init__(folder, index, size_bytes)
        assert size_bytes % PATTERN_BYTES == 0
        self._store = folder / f"store{index}.img"
        self._store_mount = folder / f"store{index}"
        self.image = self._store_mount / "disk.img"

    def attach(self) -> None:
        with self._store.open("wb") as file:
            file.truncate(max(self.size_bytes, 2 * GIB))
        run("mkfs.xfs", "-q", "-m", "reflink=1", self._store)
        self._store_mount.mkdir()
        run("mount", "-o", "loop", self._store, self._store_mount)
        with self.image.open("w+b") as file:
            for _ in range(PATTERN_BYTES // MIB):
                file.write(os.urandom(MIB))
            file.flush()
            for at in range(PATTERN_BYTES, self.size_bytes, PATTERN_BYTES):
                clone = _CLONE_RANGE.pack(file.fileno(), 0, PATTERN_BYTES, at)
                fcntl.ioctl(file.fileno(), _FICLONERANGE, clone)
        self.device = run("losetup", "-f", "--show", self.image)

    def detach(self) -> None:
        super().detach()
        if os.path.ismount(self._store_mount):
            done = subprocess.run(["umount", self._store_mount], check=False, capture_output=True)
            if done.returncode:
                subprocess.run(["umount", "-l", self._store_mount], check=False)
        self._store.unlink(missing_ok=True)

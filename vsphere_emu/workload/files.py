"""File churn: created, renamed, grown, punched, deleted, and the freed space trimmed."""

import contextlib
import ctypes
import errno
import fcntl
import os
import random
import struct
import time

from daemon.durable import storage_error
from vsphere_emu.workload.pace import Pace

FILES_MAX = 400
FILE_BYTES_MAX = 1 << 20
FREE_SHARE_MIN = 0.3
FITRIM = 0xC0185879  # linux/fs.h: _IOWR('X', 121, struct fstrim_range)
PUNCH_HOLE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
BLOCK_BYTES = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Files:
    """The workload on the file system mounted at ``folder``."""

    def __init__(self, folder: str, trim_interval_seconds: float) -> None:
        self._mount = folder
        self._folder = os.path.join(folder, "files")
        self._trim_interval_seconds = trim_interval_seconds
        self._random = random.Random(0)  # noqa: S311 - variety, not secrecy
        os.makedirs(self._folder, exist_ok=True)
        names = os.listdir(self._folder)
        self._names = {name for name in names if not name.startswith(".")}
        self._number = max((int(name.split("-")[0]) for name in self._names), default=0)

    def run(self, pace: Pace) -> None:
        """Work until ``pace`` ends."""
        trim_due = time.monotonic() + self._trim_interval_seconds
        actions = (self._create, self._rename, self._grow, self._punch, self._delete)
        while pace.next():
            if time.monotonic() >= trim_due:
                self._trim()
                trim_due = time.monotonic() + self._trim_interval_seconds
            space = os.statvfs(self._mount)
            full = space.f_bavail < space.f_blocks * FREE_SHARE_MIN
            if self._names and (full or len(self._names) >= FILES_MAX):
                self._delete()
            elif full or not self._names:
                self._create()
            else:
                self._random.choices(actions, weights=(4, 1, 2, 2, 2))[0]()

    def _create(self) -> None:
        self._number += 1
        name = f"{self._number}-a"
        size = self._random.randint(1, FILE_BYTES_MAX)
        with open(self._path(name), "wb") as file:
            file.write(self._random.randbytes(size // 2))
            file.write(bytes(size - size // 2))
            if self._random.random() < 0.5:
                file.flush()
                os.fsync(file.fileno())
        self._names.add(name)

    def _rename(self) -> None:
        old = self._pick()
        new = f"{old.split('-')[0]}-{self._random.choice('abcdef')}"
        os.rename(self._path(old), self._path(new))
        self._names.remove(old)
        self._names.add(new)

    def _grow(self) -> None:
        with open(self._path(self._pick()), "r+b") as file:
            file.seek(self._random.randrange(FILE_BYTES_MAX))
            file.write(self._random.randbytes(self._random.randint(1, 64 * 1024)))

    def _punch(self) -> None:
        with open(self._path(self._pick()), "r+b") as file:
            blocks = os.fstat(file.fileno()).st_size // BLOCK_BYTES
            if blocks < 2:
                return
            first = self._random.randrange(blocks - 1)
            length = self._random.randint(1, blocks - first) * BLOCK_BYTES
            if _libc.fallocate(file.fileno(), PUNCH_HOLE, first * BLOCK_BYTES, length) != 0:
                number = ctypes.get_errno()
                error = OSError(number, os.strerror(number))
                raise storage_error("punch a hole into", file.name, error)

    def _delete(self) -> None:
        name = self._pick()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(name))
        self._names.remove(name)

    def _trim(self) -> None:
        fd = os.open(self._mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, FITRIM, struct.pack("=QQQ", 0, (1 << 64) - 1, 0))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTTY):
                raise storage_error("trim", self._mount, error) from error
        finally:
            os.close(fd)

    def _pick(self) -> str:
        return self._random.choice(sorted(self._names))

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name)

"""Changes a disk at random in every way that there is, until SIGTERM; then all is flushed.

    python -m tests.e2e.churn device DEVICE SEED OPERATIONS_PER_SECOND
    python -m tests.e2e.churn files FOLDER SEED OPERATIONS_PER_SECOND

Several threads: writes past the page cache and through it, discards, write-zeroes, punched holes,
zeroed ranges; in a folder also truncated, grown, removed and renamed files, and FITRIM. Every
thread has regions in common with the others.
"""

import ctypes
import fcntl
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable

BLOCK_BYTES = 4096
RUN_BLOCKS_MAX = 32
THREADS = 4
FILE_COUNT = 24
FILE_BLOCKS_MAX = 256
_BLKDISCARD = 0x1277
_BLKZEROOUT = 0x127F
_FITRIM = 0xC0185879
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_LIBC = ctypes.CDLL(None, use_errno=True)

stop = threading.Event()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    arguments = (ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset))
    if _LIBC.fallocate(*arguments, ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class DeviceChurn:
    """One thread's work on a raw disk."""

    def __init__(self, path: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._direct = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._buffered = os.open(path, os.O_RDWR)
        self._blocks = os.lseek(self._direct, 0, os.SEEK_END) // BLOCK_BYTES
        self._page = mmap.mmap(-1, RUN_BLOCKS_MAX * BLOCK_BYTES)

    def step(self) -> None:
        way = self._random.randrange(8)
        # A write past the page cache that meets a dirty page there is told as an I/O error by the
        # next fsync, so each kind of write has its own part of the disk; all else goes everywhere.
        cached_from = self._blocks * 3 // 4
        first, end = 0, self._blocks
        if way < 3:
            end = cached_from
        elif way == 3:
            first = cached_from
        block = self._random.randrange(first, end)
        count = min(self._random.randint(1, RUN_BLOCKS_MAX), end - block)
        offset, length = block * BLOCK_BYTES, count * BLOCK_BYTES
        if way < 3:
            self._page[:length] = self._random.randbytes(length)
            with memoryview(self._page) as view, view[:length] as part:
                assert os.pwrite(self._direct, part, offset) == length
        elif way == 3:
            os.pwrite(self._buffered, self._random.randbytes(length), offset)
        elif way == 4:
            fcntl.ioctl(self._direct, _BLKDISCARD, struct.pack("QQ", offset, length))
        elif way == 5:
            fcntl.ioctl(self._direct, _BLKZEROOUT, struct.pack("QQ", offset, length))
        elif way == 6:
            fallocate(self._direct, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        else:
            fallocate(self._direct, _ZERO_RANGE | _KEEP_SIZE, offset, length)

    def finish(self) -> None:
        os.fsync(self._buffered)


class FileChurn:
    """One thread's work in a folder that it shares with others."""

    def __init__(self, folder: str, seed: int) -> None:
        self._random = random.Random(seed)
        self._folder = folder

    def step(self) -> None:
        path = f"{self._folder}/churn{self._random.randrange(FILE_COUNT)}"
        way = self._random.randrange(10)
        try:
            if way < 7:
                self._change(path, way)
            elif way == 7:
                os.unlink(path)
            elif way == 8:
                os.rename(path, f"{self._folder}/churn{self._random.randrange(FILE_COUNT)}")
            else:
                self._trim()
        except FileNotFoundError:
            return

    def _change(self, path: str, way: int) -> None:
        block = self._random.randrange(FILE_BLOCKS_MAX)
        length = self._random.randint(1, RUN_BLOCKS_MAX) * BLOCK_BYTES
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if way < 4:
                os.pwrite(fd, self._random.randbytes(length), block * BLOCK_BYTES)
            elif way == 4:
                fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, block * BLOCK_BYTES, length)
            elif way == 5:
                os.ftruncate(fd, block * BLOCK_BYTES)
            if way in (0, 6):
                os.fsync(fd)
        finally:
            os.close(fd)

    def _trim(self) -> None:
        if self._random.random() < 0.2:
            fd = os.open(self._folder, os.O_RDONLY)
            try:
                fcntl.ioctl(fd, _FITRIM, struct.pack("QQQ", 0, (1 << 64) - 1, 0))
            finally:
                os.close(fd)

    def finish(self) -> None:
        fd = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def work(make: Callable[[int], DeviceChurn | FileChurn], seed: int, pause_seconds: float) -> None:
    churn = make(seed)
    while not stop.is_set():
        churn.step()
        time.sleep(pause_seconds)
    churn.finish()


def main(kind: str, target: str, seed: int, per_second: float) -> None:
    signal.signal(signal.SIGTERM, lambda *_: stop.set())

    def make(seed: int) -> DeviceChurn | FileChurn:
        return DeviceChurn(target, seed) if kind == "device" else FileChurn(target, seed)

    failures = []

    def guarded(seed: int) -> None:
        try:
            work(make, seed, THREADS / per_second)
        except BaseException as error:
            failures.append(error)
            stop.set()
            raise

    threads = [threading.Thread(target=guarded, args=(seed * THREADS + n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    stop.wait()
    for thread in threads:
        thread.join()
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))

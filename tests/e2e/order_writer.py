"""Writes numbered records so that what a point holds can be checked for order.

    python -m tests.e2e.order_writer files A B ...      append records in turn, fsync after each
    python -m tests.e2e.order_writer raw DEVICE BLOCKS  write blocks past the page cache, in bursts

Record *n* is written only when record *n - 1* is on stable storage, so every instant's state is a
prefix: n without n - 1 proves that a point is no instant. On standard output comes, once a second
at most, the number of the newest record.
"""

import mmap
import os
import struct
import sys
import time

RECORD_BYTES = 64
BLOCK_BYTES = 4096
BURST_SECONDS = 0.6
REST_SECONDS = 0.9
CHECK = 0x9E3779B97F4A7C15
BULK_BYTES = 4 << 20
BULK_PIECE_BYTES = 128 << 10
STRIDE = 7919
"""A prime: successive records of a raw disk lie far apart."""


def record(number: int) -> bytes:
    """The number, and at the end something that only follows from it."""
    return struct.pack("<Q48xQ", number, number * CHECK & (1 << 64) - 1)


def block(number: int) -> bytes:
    return record(number) * (BLOCK_BYTES // RECORD_BYTES)


def slot(number: int, block_count: int) -> int:
    """The block of a raw disk on which record ``number`` lies."""
    return number * STRIDE % block_count


def write_files(paths: list[str]) -> None:
    fds = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644) for path in paths]
    bulks = [os.open(f"{path}.bulk", os.O_WRONLY | os.O_CREAT, 0o644) for path in paths]
    number, told_at = 0, 0.0
    while True:
        number += 1
        turn = number % len(fds)
        # Much that is dirty makes reading last long: an instant that is none shows.
        at = number // len(fds) * BULK_PIECE_BYTES % BULK_BYTES
        os.pwrite(bulks[turn], record(number) * (BULK_PIECE_BYTES // RECORD_BYTES), at)
        os.write(fds[turn], record(number))
        os.fsync(fds[turn])
        told_at = tell(number, told_at)


def write_raw(device: str, block_count: int) -> None:
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT | os.O_SYNC)
    page = mmap.mmap(-1, BLOCK_BYTES)
    number, told_at = 0, 0.0
    rest_at = time.monotonic() + BURST_SECONDS
    while True:
        number += 1
        page[:] = block(number)
        assert os.pwrite(fd, page, slot(number, block_count) * BLOCK_BYTES) == BLOCK_BYTES
        told_at = tell(number, told_at)
        if time.monotonic() > rest_at:
            time.sleep(REST_SECONDS)
            rest_at = time.monotonic() + BURST_SECONDS


def tell(number: int, told_at: float) -> float:
    now = time.monotonic()
    if now < told_at + 1:
        return told_at
    print(number, flush=True)  # noqa: T201 - for whoever started it
    return now


if __name__ == "__main__":
    if sys.argv[1] == "files":
        write_files(sys.argv[2:])
    else:
        write_raw(sys.argv[2], int(sys.argv[3]))

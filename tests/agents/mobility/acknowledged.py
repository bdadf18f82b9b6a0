"""Writes numbered records on several disks in turn, and notes elsewhere which are acknowledged.

    acknowledged.py NOTE [--lock LOCK] FOLDER...

Record *n* is appended to ``records`` in folder *n % count*, with fsync; then *n* is written to
NOTE, which lies on none of the disks. LOCK is held as the workload of a guest holds it.
"""

import argparse
import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vsphere_emu.workload.life import held, tell_ready

RECORD = struct.Struct("<QQ")
RECORDS_FILE = "records"
CHECK = 0x9E3779B97F4A7C15


def record(number: int) -> bytes:
    return RECORD.pack(number, number ^ CHECK)


def acknowledged(note: Path) -> int:
    """The newest record that its writer knows to be safe."""
    try:
        return int.from_bytes(note.read_bytes(), "little")
    except FileNotFoundError:
        return 0


def newest_of(folders: Sequence[Path]) -> int:
    """The newest record up to which none is missing, AssertionError for one that is damaged."""
    found = set()
    for folder in folders:
        data = (folder / RECORDS_FILE).read_bytes()
        for number, check in RECORD.iter_unpack(data[: len(data) // RECORD.size * RECORD.size]):
            if (number, check) != (0, 0):  # a size that was journalled before its data
                assert check == number ^ CHECK
                found.add(number)
    newest = 0
    while newest + 1 in found:
        newest += 1
    return newest


def command(note: Path, folders: Sequence[Path], lock: str = "") -> list[str]:
    options = ["--lock", lock] if lock else []
    return [sys.executable, __file__, str(note), *options, *map(str, folders)]


@contextlib.contextmanager
def writing(note: Path, *folders: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The writer at work; killed at the end."""
    process = subprocess.Popen(command(note, folders))
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def write(note: Path, folders: Sequence[Path]) -> None:
    fds = [
        os.open(folder / RECORDS_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for folder in folders
    ]
    noted = os.open(note, os.O_WRONLY | os.O_CREAT)
    number = acknowledged(note)
    while True:
        number += 1
        fd = fds[number % len(fds)]
        os.write(fd, record(number))
        os.fsync(fd)
        os.pwrite(noted, number.to_bytes(8, "little"), 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("note", type=Path)
    parser.add_argument("--lock", default="")
    parser.add_argument("folders", type=Path, nargs="+")
    asked = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if asked.lock:
            tell_ready(stack.enter_context(held(asked.lock)))
        write(asked.note, asked.folders)


if __name__ == "__main__":
    main()

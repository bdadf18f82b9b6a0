"""What records a recovery point holds, and whether they are a prefix."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from appliance.applier.store import Point
from replication.bookmark import Consistency
from tests.e2e.disk import Disk
from tests.e2e.order_writer import BLOCK_BYTES, CHECK, RECORD_BYTES, STRIDE, block
from tests.e2e.part import ROOT
from tests.e2e.recovered import mounted
from tests.e2e.rig import Rig

RECORDS_FILE = "records"


@contextlib.contextmanager
def writing(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The writer at work; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.order_writer", *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield process
        assert process.poll() is None, f"the writer ended with {process.returncode}"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def record_files(disks: Sequence[Disk]) -> list[Path]:
    return [disk.mount_point / RECORDS_FILE for disk in disks]


def last_in_file(path: Path, first: int, step: int) -> int:
    """The newest record of a file that holds ``first``, ``first + step`` …; 0 for none.

    AssertionError where one is missing or is not what was written.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return 0
    count = len(data) // RECORD_BYTES
    found = np.frombuffer(data[: count * RECORD_BYTES], np.uint64).reshape(count, -1)
    expected = np.zeros_like(found)
    expected[:, 0] = np.arange(first, first + count * step, step, dtype=np.uint64)
    expected[:, -1] = expected[:, 0] * np.uint64(CHECK)
    is_whole = (found == expected).all(axis=1)
    whole = count if is_whole.all() else int(np.argmin(is_whole))
    # A size that was journalled before its data reads as zeros: not written yet.
    assert not any(data[whole * RECORD_BYTES :]), f"{path}: record {whole} of {count} is damaged"
    return first + (whole - 1) * step if whole else 0


def assert_files_hold_prefix(rig: Rig, point: Point, scratch: Path) -> int:
    """The newest record of all disks' files; AssertionError where one before it is missing."""
    count = len(rig.disks)
    last = []
    for disk in rig.disks:
        first = disk.index or count  # record n goes to file n % count
        with mounted(rig.reader(), point.position, disk.index, disk.file_system, scratch) as folder:
            last.append(last_in_file(folder / RECORDS_FILE, first, count))
    newest = max(last)
    expected = [_newest_of(index, newest, count) for index in range(count)]
    stamp, consistency = point.bookmark.stamp, point.bookmark.consistency.value
    assert last == expected, f"{stamp} ({consistency}) holds up to {last} on the disks: no prefix"
    return newest


def _newest_of(index: int, newest: int, count: int) -> int:
    number = newest - (newest - index) % count
    return max(number, 0)


def raw_prefix(rig: Rig, point: Point, disk: Disk) -> tuple[int, list[int]]:
    """The newest record on a raw disk, and the blocks that do not hold what they held then."""
    block_count = disk.size_bytes // BLOCK_BYTES
    with rig.reader().open_view(point.position, disk.index) as view:
        data = b"".join(view.read(at, 1 << 20) for at in range(0, disk.size_bytes, 1 << 20))
    blocks = np.frombuffer(data, np.uint64).reshape(block_count, -1)
    numbers = blocks[:, 0].astype(np.int64)
    newest = int(numbers.max())
    inverse = pow(STRIDE, -1, block_count)
    residues = np.arange(block_count, dtype=np.int64) * inverse % block_count
    expected = newest - (newest - residues) % block_count
    expected[expected < 1] = 0
    wrong = np.flatnonzero(numbers != expected)
    for at in np.flatnonzero(numbers):
        held = data[at * BLOCK_BYTES : (at + 1) * BLOCK_BYTES]
        assert held == block(int(numbers[at])), f"block {at} is torn"
    return newest, wrong.tolist()


def is_restorable(point: Point) -> bool:
    return point.bookmark.consistency is not Consistency.NONE

"""The dirty blocks of one disk, found by comparing digests: for disks the kernel does not tell of.

Beside the agent's state lies a table of the digests (16 bytes a block, sparse as the disk is) of
what was last told. ``swap`` reads the disk and returns the blocks whose digest differs, with the
new digests in a second file; ``forget`` takes them over into the table.

**Why a crash loses nothing.** The table only ever changes in ``forget``, thus for blocks that are
already durable elsewhere: whatever part of it a crash leaves undone is found once more by the next
scan. The second file needs no durability at all.

**What this cannot do.** A scan takes as long as reading the disk and sees no single moment of it:
``peek`` knows nothing between two scans, so a point made from it has ``consistency: none``. And a
block that changes after the scan, is read for sending, and then changes *back* before the next
scan looks unchanged; the continuous audit finds that one.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

import numpy as np

from daemon.durable import storage_error, sync_folder
from replication.block_set import BLOCK_BYTES, BlockSet
from replication.checksum import DIGEST_BYTES, block_digests

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from agents.mobility.device import Device

SCAN_BLOCKS = 256
"""Blocks that are read and compared at once (1 MiB)."""

TABLE_BLOCKS = 1 << 16
"""Entries of the table that are looked through at once (1 MiB)."""


class ScanTracker:
    """A ``Tracker`` that reads the whole disk at each ``swap``; see the module's text."""

    def __init__(self, device: Device, table_path: str) -> None:
        self._device = device
        self._path = table_path
        self._pending_path = f"{table_path}.pending"
        self._swapped: BlockSet | None = None
        self.fresh = not os.path.exists(table_path)

    @classmethod
    def attach(cls, device: Device, table_path: str) -> ScanTracker:
        """Go on with the table at ``table_path``; ``fresh`` where none of this disk's size is.

        The table is made by the first ``forget``; the folder must be there. Raises StorageError.
        """
        try:
            if os.path.exists(table_path):
                table_bytes = os.stat(table_path).st_size
                if table_bytes != device.block_count * DIGEST_BYTES:
                    os.unlink(table_path)
                    sync_folder(os.path.dirname(table_path) or ".")
        except OSError as error:
            raise storage_error("open the digest table", table_path, error) from error
        return cls(device, table_path)

    def swap(self) -> BlockSet:
        """Scan the disk; returns the blocks that are not as the table has them."""
        self._swapped = None
        changed = BlockSet(self._device.block_count)
        try:
            with ExitStack() as opened:
                table = _opened(opened, self._path, os.O_RDONLY) if not self.fresh else -1
                pending = _opened(opened, self._pending_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                os.ftruncate(pending, self._device.block_count * DIGEST_BYTES)
                allocated = BlockSet(self._device.block_count)
                for first, count in self._device.allocated_runs():
                    allocated.add_run(first, count)
                for first, count in _pieces(allocated, SCAN_BLOCKS):
                    data = self._device.read(first * BLOCK_BYTES, count * BLOCK_BYTES)
                    digests = block_digests(data)
                    before = _entries(table, first, count)
                    now = np.frombuffer(digests, np.uint64).reshape(-1, 2)
                    if not np.array_equal(before, now):
                        _write_at(pending, digests, first * DIGEST_BYTES)
                        _add(changed, first, before != now)
                # What was data and is a hole now: its digest in the new file is zeros already.
                known = BlockSet(self._device.block_count)
                if table >= 0:
                    everything = BlockSet.full(self._device.block_count)
                    for first, count in _pieces(everything, TABLE_BLOCKS):
                        _add(known, first, _entries(table, first, count) != 0)
                known -= allocated
                changed |= known
        except OSError as error:
            raise storage_error("scan against the digest table", self._path, error) from error
        self._swapped = changed
        return changed.copy()

    def forget(self) -> None:
        """Take the digests of what the last ``swap`` returned over into the table, durably."""
        assert self._swapped is not None, "forget() follows a swap() by the same process"
        try:
            with ExitStack() as opened:
                pending = _opened(opened, self._pending_path, os.O_RDONLY)
                table = _opened(opened, self._path, os.O_RDWR | os.O_CREAT)
                os.ftruncate(table, self._device.block_count * DIGEST_BYTES)
                for first, count in _pieces(self._swapped, TABLE_BLOCKS):
                    digests = os.pread(pending, count * DIGEST_BYTES, first * DIGEST_BYTES)
                    _write_at(table, digests, first * DIGEST_BYTES)
                os.fsync(table)
            sync_folder(os.path.dirname(self._path) or ".")
            os.unlink(self._pending_path)
        except OSError as error:
            raise storage_error("update the digest table", self._path, error) from error
        self._swapped = None
        self.fresh = False

    def peek(self) -> BlockSet:
        """The blocks that the last ``swap`` returned, until they are forgotten; no later ones."""
        return BlockSet(self._device.block_count) if self._swapped is None else self._swapped.copy()

    def peek_running(self) -> BlockSet:
        """Always empty: between two scans nothing is known, so there is no point in time."""
        return BlockSet(self._device.block_count)

    def close(self) -> None:
        """Let go; the next process finds the changes by its own scan."""

    def remove(self) -> None:
        """Delete the table."""
        try:
            for path in (self._pending_path, self._path):
                with suppress(FileNotFoundError):
                    os.unlink(path)
            sync_folder(os.path.dirname(self._path) or ".")
        except OSError as error:
            raise storage_error("delete the digest table", self._path, error) from error


def _opened(opened: ExitStack, path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    opened.callback(os.close, fd)
    return fd


def _pieces(blocks: BlockSet, count_max: int) -> Iterator[tuple[int, int]]:
    """The runs of a set, cut into pieces of at most ``count_max`` blocks."""
    for first, count in blocks.runs():
        for piece in range(first, first + count, count_max):
            yield piece, min(count_max, first + count - piece)


def _entries(table: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """The table's digests as rows of two numbers; zeros where there is no table yet."""
    if table < 0:
        return np.zeros((count, 2), np.uint64)
    found = os.pread(table, count * DIGEST_BYTES, first * DIGEST_BYTES)
    return np.frombuffer(found, np.uint64).reshape(-1, 2)


def _write_at(fd: int, data: bytes, offset_bytes: int) -> None:
    with memoryview(data) as view:
        done = 0
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset_bytes + done)


def _add(blocks: BlockSet, first: int, chosen: npt.NDArray[np.bool_]) -> None:
    """Add the blocks ``first + i`` for which either half of row ``chosen[i]`` is true."""
    rows = (chosen[:, 0] | chosen[:, 1]).astype(np.int8)
    edges = np.flatnonzero(np.diff(rows, prepend=0, append=0)).reshape(-1, 2)
    for start, end in edges.tolist():
        blocks.add_run(first + start, end - start)

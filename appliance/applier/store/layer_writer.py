"""Write one layer: blocks as they arrive, then index, digests, header; then it is whole.

Data goes to the file at once and its digests to a file beside it, so that memory grows with the
number of extents alone (EXTENT_COUNT_MAX of them at most). Blocks that a later frame of the same
changeset replaces stay in the data area as dead bytes: no index entry names them.
"""

from __future__ import annotations

import os
import struct
import threading
from typing import TYPE_CHECKING, Self

import numpy as np
import xxhash

from appliance.applier.store.extents import DISK_INDEX_MAX, ZERO, Extents, key_of, resolve
from appliance.applier.store.layer_format import (
    DESCRIPTION_BYTES_MAX,
    LayerHeader,
    Section,
    data_offset,
    pack_description,
    pack_header,
    pack_index,
)
from daemon.durable import storage_error
from replication.block_set import BLOCK_BYTES, BLOCK_COUNT_MAX, block_count_of
from replication.checksum import DIGEST_BYTES, block_digests
from replication.errors import PeerError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Callable, Sequence

    from replication.bookmark import Bookmark, DiskShape, Stamp

CHANGESET_EXTENTS_MAX = 1 << 20
"""Extents of one changeset before they are resolved: 40 MiB of memory."""

COPY_BYTES = 1 << 20
_RECORD = struct.Struct("<qqqq")


class LayerFile:
    """A layer under construction: an append-only data area and the sections after it.

    ``append`` may be called from several threads; ``finish`` once, when they are done.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.data_blocks = 0
        self._lock = threading.Lock()
        self._digests_path = f"{path}.digests"
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise storage_error("create", path, error) from error
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._digests_fd = os.open(self._digests_path, flags, 0o600)
            os.unlink(self._digests_path)  # only this process needs it
        except OSError as error:
            os.close(self._fd)
            raise storage_error("create", self._digests_path, error) from error

    def append(self, data: bytes | bytearray | memoryview, digests: bytes | None = None) -> int:
        """Add whole blocks; return the number of the first. ``digests`` when they are known."""
        view = memoryview(data)
        count = len(view) // BLOCK_BYTES
        assert count * BLOCK_BYTES == len(view)
        if digests is None:
            digests = block_digests(view)
        with self._lock:
            first = self.data_blocks
            self.data_blocks += count
        try:
            write_all(self._fd, view, data_offset(first))
            write_all(self._digests_fd, memoryview(digests), first * DIGEST_BYTES)
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        return first

    def finish(
        self,
        extents: Extents,
        *,
        machine: uuid.UUID,
        first: int,
        last: int,
        parent: Stamp,
        bookmark: Bookmark,
        attempt: bytes,
        applied_ns: int,
        disks: Sequence[DiskShape],
    ) -> LayerHeader:
        """Write the sections and the header and make the file durable; the name is not yet."""
        try:
            index = pack_index(extents)
            index_at = data_offset(self.data_blocks)
            write_all(self._fd, memoryview(index), index_at)
            digests_at = index_at + len(index)
            digests = self._copy_digests(digests_at)
            description = pack_description(bookmark, disks)
            if len(description) > DESCRIPTION_BYTES_MAX:
                raise PeerError(
                    f"names of disks and the bookmark's reason take {len(description)} bytes;"
                    f" at most {DESCRIPTION_BYTES_MAX} are kept"
                )
            described = Section(
                digests_at + digests.size_bytes,
                len(description),
                xxhash.xxh3_128_digest(description),
            )
            write_all(self._fd, memoryview(description), described.offset)
            header = LayerHeader(
                machine=machine,
                first=first,
                last=last,
                parent=parent,
                bookmark=bookmark,
                attempt=attempt,
                applied_ns=applied_ns,
                disks=tuple(disks),
                data_blocks=self.data_blocks,
                extent_count=len(extents),
                index=Section(index_at, len(index), xxhash.xxh3_128_digest(index)),
                digests=digests,
            )
            write_all(self._fd, memoryview(pack_header(header, described)), 0)
            os.fsync(self._fd)
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        return header

    def _copy_digests(self, offset: int) -> Section:
        hasher = xxhash.xxh3_128()
        size_bytes = self.data_blocks * DIGEST_BYTES
        for at in range(0, size_bytes, COPY_BYTES):
            part = os.pread(self._digests_fd, min(COPY_BYTES, size_bytes - at), at)
            hasher.update(part)
            write_all(self._fd, memoryview(part), offset + at)
        return Section(offset, size_bytes, hasher.digest())

    def close(self) -> None:
        for fd in (self._fd, self._digests_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._digests_fd = -1


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """Write all of ``view`` at ``offset``, in as many calls as the kernel wants."""
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


class LayerWriter:
    """Takes the blocks of one changeset; nothing of it is visible until ``seal`` returns.

    A context manager: what was not sealed is removed. ``write``, ``write_extents`` and ``zero``
    may be called from several threads.
    """

    def __init__(
        self,
        path: str,
        seal: Callable[[LayerWriter, Bookmark, int, bytes, Sequence[DiskShape]], int],
    ) -> None:
        self.file = LayerFile(path)
        self._seal = seal
        self._records = bytearray()
        self._lock = threading.Lock()
        self._open = True

    def write(
        self, disk: int, block: int, order: int, data: bytes | bytearray | memoryview
    ) -> None:
        """Whole blocks from ``block`` on; where blocks overlap the greatest ``order`` wins."""
        self.write_extents(disk, [(block, len(data) // BLOCK_BYTES)], order, data)

    def write_extents(
        self,
        disk: int,
        extents: Sequence[tuple[int, int]],
        order: int,
        data: bytes | bytearray | memoryview,
    ) -> None:
        """A whole frame in one system call: ``data`` holds the runs ``(block, count)`` in turn."""
        assert self._open
        if not data or len(data) % BLOCK_BYTES:
            raise PeerError(f"{len(data)} bytes for disk {disk} are not whole blocks")
        if sum(count for _, count in extents) * BLOCK_BYTES != len(data):
            raise PeerError(f"{len(data)} bytes for disk {disk} are not what the extents hold")
        for block, count in extents:
            _check(disk, block, count)
        first = self.file.append(data)
        records = bytearray()
        for block, count in extents:
            records += _RECORD.pack(key_of(disk, block), count, first, order)
            first += count
        self._record(records)

    def zero(self, disk: int, block: int, count: int, order: int) -> None:
        """``count`` blocks of zeros from ``block`` on."""
        assert self._open
        _check(disk, block, count)
        self._record(_RECORD.pack(key_of(disk, block), count, ZERO, order))

    def seal(
        self, bookmark: Bookmark, since: int, attempt: bytes, disks: Sequence[DiskShape]
    ) -> int:
        """Make the changeset the machine's new head; return its position.

        It is durable when this returns. Raises OutOfOrderError when it does not follow the head,
        PeerError when it writes past the end of a disk, StorageError when the disk refuses.
        """
        assert self._open
        position = self._seal(self, bookmark, since, attempt, disks)
        self._close()
        return position

    def extents(self, disks: Sequence[DiskShape]) -> Extents:
        """What was written, newest winning; checked against the disks' sizes."""
        table = np.frombuffer(bytes(self._records), np.int64).reshape(-1, 4)
        found = resolve(table[:, 0], table[:, 1], table[:, 2], table[:, 3])
        sizes = {disk.index: block_count_of(disk.size_bytes) for disk in disks}
        for disk in np.unique(found.disk).tolist():
            if disk not in sizes:
                raise PeerError(f"a changeset writes to disk {disk}, which it does not declare")
            of_disk = found.of_disk(disk)
            end = int((of_disk.block + of_disk.count).max())
            if end > sizes[disk]:
                raise PeerError(
                    f"a changeset writes block {end - 1} of disk {disk},"
                    f" which has {sizes[disk]} blocks"
                )
        return found

    def _record(self, records: bytes | bytearray) -> None:
        with self._lock:
            if len(self._records) + len(records) > CHANGESET_EXTENTS_MAX * _RECORD.size:
                raise PeerError(
                    f"a changeset holds more than {CHANGESET_EXTENTS_MAX} extents",
                    hint="cut it into several",
                )
            self._records += records

    def _close(self) -> None:
        self._open = False
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._close()
            try:
                os.unlink(self.file.path)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise storage_error("remove", self.file.path, error) from error


def _check(disk: int, block: int, count: int) -> None:
    if not 0 <= disk <= DISK_INDEX_MAX:
        raise PeerError(f"disk {disk} is outside 0 to {DISK_INDEX_MAX}")
    if block < 0 or count <= 0 or block + count > BLOCK_COUNT_MAX:
        raise PeerError(f"blocks {block} to {block + count} of disk {disk} are not on any disk")

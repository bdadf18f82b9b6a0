"""The base of one disk: its image at the base's position and a digest for each of its blocks.

Both files are sparse. A hole in the digests says "zeros", as a hole in the image does; a page of
digests that a disk lost would say so wrongly, therefore zeros are believed only where the image
agrees. What lies past the end of either file is zeros.

Source: docs/STORE.md §4.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Self

from appliance.applier.store.layer_reader import read_into
from appliance.applier.store.layer_writer import write_all
from daemon.durable import make_folder, storage_error, sync_folder
from replication.block_set import BLOCK_BYTES
from replication.checksum import DIGEST_BYTES
from replication.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from appliance.applier.store.base_record import BaseRecord

NAMES = ("base.img", "base.digest")

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_PUNCH_BYTES_MAX = 1 << 40
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def base_folder(machine_folder: str, disk: int) -> str:
    return os.path.join(machine_folder, "disks", str(disk))


def check_bases(machine_folder: str, record: BaseRecord | None) -> None:
    """Raise IntegrityError when a disk of the base's point lacks a file, or a part of one.

    What is missing would look like zeros, and the next fold would make it anew.
    """
    if record is not None and record.point is not None:
        for shape in record.point.disks:
            check_base(machine_folder, record, shape.index)


def check_base(machine_folder: str, record: BaseRecord | None, disk: int) -> None:
    """As ``check_bases``, for one disk."""
    if record is None or record.point is None:
        return
    if all(shape.index != disk for shape in record.point.disks):
        return
    paths = [os.path.join(base_folder(machine_folder, disk), name) for name in NAMES]
    sizes = record.sizes.get(disk, (0, 0))
    found = [_size_of(path, size) for path, size in zip(paths, sizes, strict=True)]
    # Where one alone is cut, the other one refuses each block that is lost, and it is repaired.
    if all(has < had for has, had in zip(found, sizes, strict=True)):
        raise IntegrityError(
            f"{paths[0]} and {NAMES[1]} have {found[0]} and {found[1]} bytes, and had {sizes[0]} "
            f"and {sizes[1]} at the newest fold",
            hint="put them back, or move the machine's folder away: a resync brings it anew",
        )


def _size_of(path: str, size_bytes: int) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{path} is missing, which the base needs",
            hint="put it back. If that cannot be, and the other of the two is whole, make a hole: "
            f"truncate -s {size_bytes} {path}; its blocks are refused then, and the source is "
            "asked for them",
        ) from error


def base_sizes(machine_folder: str, disks: Iterable[int]) -> dict[int, tuple[int, int]]:
    """What ``BaseRecord.sizes`` says after a fold."""
    found = {}
    for disk in disks:
        paths = [os.path.join(base_folder(machine_folder, disk), name) for name in NAMES]
        image, digests = (os.stat(path).st_size for path in paths)
        found[disk] = (image, digests)
    return found


class BaseImage:
    """``base.img`` and ``base.digest`` of one disk; readable from several threads."""

    def __init__(self, folder: str, image_fd: int, digest_fd: int) -> None:
        self.image_path = os.path.join(folder, "base.img")
        self.digest_path = os.path.join(folder, "base.digest")
        self._image_fd = image_fd
        self._digest_fd = digest_fd

    @classmethod
    def open(cls, folder: str) -> BaseImage | None:
        """For reading; None when nothing has been folded into the disk yet."""
        return cls._open(folder, os.O_RDONLY)

    @classmethod
    def open_for_writing(cls, folder: str) -> BaseImage:
        """Created durably when it is missing."""
        make_folder(folder)
        made = cls._open(folder, os.O_RDWR | os.O_CREAT)
        assert made is not None
        sync_folder(folder)
        return made

    @classmethod
    def _open(cls, folder: str, flags: int) -> BaseImage | None:
        fds: list[int] = []
        try:
            for name in NAMES:
                path = os.path.join(folder, name)
                fds.append(os.open(path, flags | os.O_CLOEXEC, 0o600))
        except OSError as error:
            for fd in fds:
                os.close(fd)
            if isinstance(error, FileNotFoundError):
                return None
            raise storage_error("open", path, error) from error
        return cls(folder, *fds)

    def digests(self, block: int, count: int) -> bytearray:
        """Digests of ``count`` blocks; unchecked, as only the data can confirm them."""
        found = bytearray(count * DIGEST_BYTES)
        read_into(self._digest_fd, memoryview(found), block * DIGEST_BYTES, self.digest_path)
        return found

    def read_into(self, block: int, into: memoryview) -> None:
        done = read_into(self._image_fd, into, block * BLOCK_BYTES, self.image_path)
        if done < len(into):
            into[done:] = bytes(len(into) - done)

    def data_runs(self, block: int, count: int) -> Iterator[tuple[int, int]]:
        """Where between ``block`` and ``block + count`` the image has no hole."""
        at, end = block * BLOCK_BYTES, (block + count) * BLOCK_BYTES
        while at < end:
            try:
                data = os.lseek(self._image_fd, at, os.SEEK_DATA)
                at = os.lseek(self._image_fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                    return
                raise storage_error("read", self.image_path, error) from error
            first = max(block, data // BLOCK_BYTES)
            last = min(block + count, -(-at // BLOCK_BYTES))
            if first < last:
                yield first, last - first

    def write(self, block: int, data: memoryview, digests: bytes | memoryview) -> None:
        try:
            write_all(self._image_fd, data, block * BLOCK_BYTES)
            write_all(self._digest_fd, memoryview(digests), block * DIGEST_BYTES)
        except OSError as error:
            raise storage_error("write", self.image_path, error) from error

    def zero(self, block: int, count: int) -> None:
        """Make a hole of ``count`` blocks in both files."""
        for fd, unit, path in (
            (self._image_fd, BLOCK_BYTES, self.image_path),
            (self._digest_fd, DIGEST_BYTES, self.digest_path),
        ):
            end = min((block + count) * unit, os.fstat(fd).st_size)
            for at in range(block * unit, end, _PUNCH_BYTES_MAX):
                _punch(fd, at, min(_PUNCH_BYTES_MAX, end - at), path)

    def sync(self) -> None:
        for fd, path in (
            (self._image_fd, self.image_path),
            (self._digest_fd, self.digest_path),
        ):
            try:
                os.fsync(fd)
            except OSError as error:
                raise storage_error("write", path, error) from error

    def close(self) -> None:
        for fd in (self._image_fd, self._digest_fd):
            if fd >= 0:
                os.close(fd)
        self._image_fd = self._digest_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def allocate(fd: int, size_bytes: int) -> None:
    """Reserve room for a file; OSError when there is none, or the file system cannot."""
    while _libc.fallocate(fd, 0, 0, size_bytes) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def _punch(fd: int, offset: int, length: int, path: str) -> None:
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code == errno.EOPNOTSUPP:
            _write_zeros(fd, offset, length)
            return
        if code != errno.EINTR:
            raise storage_error("write", path, OSError(code, os.strerror(code)))


def _write_zeros(fd: int, offset: int, length: int) -> None:
    zeros = memoryview(bytes(min(length, 1 << 20)))
    for at in range(offset, offset + length, len(zeros)):
        write_all(fd, zeros[: offset + length - at], at)

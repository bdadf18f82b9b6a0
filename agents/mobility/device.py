"""A block device as the agent reads it: who it is, how large it is, and its bytes.

Reading never goes through the device's own page cache: behind a mounted file system that can be
stale. A loop device is read through its image file, whose page cache is the very one that the
loop device writes to (and forty times quicker at 4 KiB); everything else, and a loop device that
itself works past the page cache, is read with O_DIRECT.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import queue
import stat
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from daemon.durable import storage_error
from replication.block_set import BLOCK_BYTES, block_count_of
from replication.errors import ConfigError, PeerError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

DIRECT_READ_BYTES_MAX = 1 << 20
"""The largest single read past the page cache, and the size of a buffer for one."""

DIRECT_BUFFERS_MAX = 4
"""Buffers that an idle device keeps for the next reads."""

_BLKGETSIZE64 = 0x80081272
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232  # it begins with lo_device, lo_inode, lo_rdevice, lo_offset
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """What must stay the same for the tracker's bits to be about the same disk.

    ``boot_id``: of this boot of the kernel; ``device``: "major:minor"; ``diskseq``: the kernel's
    number of this appearance of a disk (0 before Linux 5.15); ``backing``: a loop device's image
    as "major:minor:inode", otherwise the disk's WWID or serial number, "" where it has none.
    """

    boot_id: str
    device: str
    diskseq: int
    size_bytes: int
    backing: str

    def as_json(self) -> dict[str, str | int]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Read what ``as_json`` made; raises PeerError on anything else."""
        fields = {"boot_id": str, "device": str, "diskseq": int, "size_bytes": int, "backing": str}
        if not isinstance(found, dict) or found.keys() != fields.keys():
            raise PeerError(f"not a device's identity: {found!r}")
        if any(type(found[name]) is not type_ for name, type_ in fields.items()):
            raise PeerError(f"a device's identity has fields of wrong types: {found!r}")
        return cls(**found)


class Named(Protocol):
    """A disk by where it is, ``path``, and by the kernel's name for it."""

    @property
    def path(self) -> str: ...
    @property
    def name(self) -> str: ...


class Device:
    """One whole disk, opened for reading; safe to read from several threads at once.

    ``dev``: the kernel's number, (major << 20) | minor. ``loop_image``: path of the image file of
    a loop device that is read through it, else None; ``loop_offset``: where in it the disk begins.
    """

    def __init__(self, path: str, fd: int, number: int) -> None:
        self.path = path
        self._fd = fd
        major, minor = os.major(number), os.minor(number)
        self.dev = (major << 20) | minor
        self._sysfs = os.path.realpath(f"/sys/dev/block/{major}:{minor}")
        self.name = os.path.basename(self._sysfs)
        self.size_bytes = self.size_now_bytes()
        self.block_count = block_count_of(self.size_bytes)
        self.loop_image: str | None = None
        self.loop_offset = 0
        self._image_fd = -1
        self._direct_fd = -1
        self._was_going = self._is_going()
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        backing = self._open_backing()
        if self._image_fd < 0:
            self._direct_fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot_id = file.read().strip()
        self.identity = DeviceIdentity(
            boot_id=boot_id,
            device=f"{major}:{minor}",
            diskseq=int(self._sysfs_text("diskseq") or "0"),
            size_bytes=self.size_bytes,
            backing=backing,
        )

    @classmethod
    def open(cls, path: str) -> Device:
        """Open a disk for reading.

        Raises ConfigError: nothing there, not a block device, a partition, an empty device, or a
        size that is not whole sectors. Raises StorageError where the system refuses to open it.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ConfigError(
                f"the disk {path} does not exist", hint="lsblk lists this machine's disks"
            ) from error
        except OSError as error:
            raise storage_error("open", path, error) from error
        device = None
        try:
            found = os.fstat(fd)
            if not stat.S_ISBLK(found.st_mode):
                raise ConfigError(
                    f"{path} is not a block device", hint="name a disk, for example /dev/sda"
                )
            number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
            if os.path.exists(f"/sys/dev/block/{number}/partition"):
                raise ConfigError(f"{path} is a partition", hint="protect the whole disk")
            device = cls(path, fd, found.st_rdev)
            if device.size_bytes == 0 or device.size_bytes % 512:
                raise ConfigError(
                    f"{path} has {device.size_bytes} bytes, which is not a disk",
                    hint="attach a medium or an image of whole 512-byte sectors first",
                )
        except OSError as error:
            raise storage_error("open", path, error) from error
        finally:
            if device is None:
                os.close(fd)
            elif device.size_bytes == 0 or device.size_bytes % 512:
                device.close()
        return device

    def close(self) -> None:
        """Let the device go; it must not be read from any more."""
        for fd in (self._fd, self._image_fd, self._direct_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._image_fd = self._direct_fd = -1
        while not self._buffers.empty():
            self._buffers.get_nowait().close()

    def size_now_bytes(self) -> int:
        """The size as the kernel has it now; differs from ``size_bytes`` after a resize."""
        answer = fcntl.ioctl(self._fd, _BLKGETSIZE64, bytes(8))
        return int.from_bytes(answer, "little")

    def why_gone(self) -> str:
        """Why this is not the disk any more that was opened; empty while it is.

        Somebody who detaches a loop device that others have open marks it: it goes with the last
        of them, and whoever keeps it open keeps it.
        """
        diskseq = self._sysfs_text("diskseq") or "0"
        if not os.path.isdir(self._sysfs) or int(diskseq) != self.identity.diskseq:
            return f"{self.path} is gone"
        if self._is_going() and not self._was_going:
            return f"{self.path} is being detached"
        return ""

    def read(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read whole blocks; a short last block of the disk is padded with zeros.

        Raises StorageError: the disk cannot be read, or has become shorter.
        """
        wanted = self._on_disk(offset_bytes, length_bytes)
        if self._image_fd >= 0:
            parts = []
            while wanted:
                part = self._pread(wanted, offset_bytes)
                parts.append(part)
                offset_bytes += len(part)
                wanted -= len(part)
                length_bytes -= len(part)
            parts.append(bytes(length_bytes))
            return parts[0] if len(parts) == 2 and not length_bytes else b"".join(parts)
        made = bytearray(length_bytes)
        self._read_direct(memoryview(made), offset_bytes, wanted)
        return bytes(made)

    def read_into(self, buffer: memoryview | bytearray | mmap.mmap, offset_bytes: int) -> None:
        """Fill ``buffer``, whole blocks, as ``read`` does; quickest when it begins at a page."""
        with memoryview(buffer) as whole, whole.cast("B") as view:
            wanted = self._on_disk(offset_bytes, len(view))
            if self._image_fd < 0:
                self._read_direct(view, offset_bytes, wanted)
            else:
                done = 0
                while done < wanted:
                    with view[done:wanted] as rest:
                        done += self._preadv(self._image_fd, rest, offset_bytes + done)
            if wanted < len(view):
                view[wanted:] = bytes(len(view) - wanted)

    def allocated_runs(self) -> Iterator[tuple[int, int]]:
        """Yield runs ``(first block, count)`` that may hold data; all else reads as zeros.

        For a loop device the holes of its image are left out, otherwise it is the whole disk. What
        is written while this runs may or may not be seen: track first, then ask. Raises
        StorageError where it cannot be told, or the image has become shorter.
        """
        if self._image_fd < 0:
            yield 0, self.block_count
            return
        position, end = self.loop_offset, self.loop_offset + self.size_bytes
        block = 0  # the first that has not been told yet
        while position < end:
            try:
                data = os.lseek(self._image_fd, position, os.SEEK_DATA)
                hole = os.lseek(self._image_fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno != errno.ENXIO:  # what cannot be looked at is no hole
                    raise storage_error("look for data in", self.path, error) from error
                # No data from here on, which a file that was cut off says of what it has lost too.
                size_bytes = os.fstat(self._image_fd).st_size
                if size_bytes < end:
                    raise self._shrunk(size_bytes - self.loop_offset) from error
                return
            if data >= end:
                return
            first = max((data - self.loop_offset) // BLOCK_BYTES, block)
            after = block_count_of(min(hole, end) - self.loop_offset)
            if after > first:
                yield first, after - first
                block = after
            position = hole

    def _open_backing(self) -> str:
        """Open a loop device's image if it may be read instead; what the disk is backed by."""
        if not os.path.isdir(f"{self._sysfs}/loop"):
            for name in ("wwid", "device/wwid", "serial", "device/serial"):
                if text := self._sysfs_text(name):
                    return text
            return ""
        status = fcntl.ioctl(self._fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
        number, inode, _, offset = memoryview(status)[:32].cast("Q")
        image = f"{os.major(number)}:{os.minor(number)}"
        path = self._sysfs_text("loop/backing_file")
        past_cache = self._sysfs_text("loop/dio") == "1"
        if path and not past_cache and not path.endswith(_DELETED):
            fd = -1
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                found = os.fstat(fd)
                if (found.st_dev, found.st_ino) == (number, inode):
                    self.loop_image, self.loop_offset, self._image_fd = path, offset, fd
                    fd = -1
            except OSError:
                pass  # seen from another mount namespace, or replaced: the device itself answers
            finally:
                if fd >= 0:
                    os.close(fd)
        return f"{image}:{inode}"

    def _is_going(self) -> bool:
        return self._sysfs_text("loop/autoclear") == "1"

    def _sysfs_text(self, name: str) -> str:
        try:
            with open(f"{self._sysfs}/{name}") as file:
                return file.read().strip()
        except OSError:
            return ""

    def _on_disk(self, offset_bytes: int, length_bytes: int) -> int:
        """How many of the bytes asked for the disk has; the rest pads its last block."""
        assert offset_bytes >= 0
        assert offset_bytes % BLOCK_BYTES == 0
        assert length_bytes % BLOCK_BYTES == 0
        assert offset_bytes + length_bytes <= self.block_count * BLOCK_BYTES
        return min(length_bytes, self.size_bytes - offset_bytes)

    def _pread(self, length_bytes: int, offset_bytes: int) -> bytes:
        try:
            part = os.pread(self._image_fd, length_bytes, self.loop_offset + offset_bytes)
        except OSError as error:
            raise storage_error("read", self.path, error) from error
        if not part:
            raise self._shrunk(offset_bytes)
        return part

    def _preadv(self, fd: int, view: memoryview | mmap.mmap, offset_bytes: int) -> int:
        skip = self.loop_offset if fd == self._image_fd else 0
        try:
            done = os.preadv(fd, [view], skip + offset_bytes)
        except OSError as error:
            raise storage_error("read", self.path, error) from error
        if done == 0:
            raise self._shrunk(offset_bytes)
        return done

    def _read_direct(self, view: memoryview, offset_bytes: int, wanted: int) -> None:
        """Read ``wanted`` bytes into ``view`` past the page cache."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if wanted else 0
        if address % BLOCK_BYTES == 0:
            done = 0
            while done < wanted:
                with view[done : min(wanted, done + DIRECT_READ_BYTES_MAX)] as part:
                    done += self._preadv(self._direct_fd, part, offset_bytes + done)
            return
        try:
            buffer = self._buffers.get_nowait()
        except queue.Empty:
            buffer = mmap.mmap(-1, DIRECT_READ_BYTES_MAX)
        done = 0
        with memoryview(buffer) as pages:
            while done < wanted:
                with pages[: min(wanted - done, DIRECT_READ_BYTES_MAX)] as part:
                    got = self._preadv(self._direct_fd, part, offset_bytes + done)
                    view[done : done + got] = part[:got]
                done += got
        if self._buffers.qsize() < DIRECT_BUFFERS_MAX:
            self._buffers.put(buffer)
        else:
            buffer.close()

    def _shrunk(self, offset_bytes: int) -> StorageError:
        return StorageError(
            f"the disk {self.path} of {self.size_bytes} bytes ends at {offset_bytes}: it shrank",
            hint="protect it anew with its new size; the recovery points so far are kept",
        )

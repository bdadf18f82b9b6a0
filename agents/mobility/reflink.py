"""A point in time of a disk that no file system can freeze: a clone of its image.

FICLONE shares the image's extents at one instant; writers wait meanwhile (about 12 us an extent).
It needs a loop device whose image lies on a file system that can do it (XFS, btrfs).
The clone has no name, so nothing is left behind whatever happens.

Source: ioctl_ficlone(2), open(2) on O_TMPFILE.
"""

import fcntl
import os
import time
from types import TracebackType
from typing import Self

from agents.mobility.device import Device
from replication.block_set import BLOCK_BYTES
from replication.errors import CaptureError, StorageError

_FICLONE = 0x40049409


class ReflinkClone:
    """The state of a loop device's image at ``taken_ns``; a context manager."""

    def __init__(self, fd: int, offset_bytes: int, size_bytes: int, taken_ns: int) -> None:
        self._fd = fd
        self._offset_bytes = offset_bytes
        self._size_bytes = size_bytes
        self.taken_ns = taken_ns

    @classmethod
    def of(cls, device: Device) -> Self:
        """Raise CaptureError, saying why, when the image cannot be cloned."""
        image = device.loop_image
        if image is None:
            raise CaptureError(f"{device.path} has no image that could be cloned")
        fd = -1
        try:
            fd = os.open(os.path.dirname(image), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            image_fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _check_same(device, image, image_fd)
                taken_ns = time.time_ns()
                fcntl.ioctl(fd, _FICLONE, image_fd)
            finally:
                os.close(image_fd)
        except OSError as error:
            _close(fd)
            raise CaptureError(
                f"{image} cannot be cloned: {error.strerror}",
                hint='reflinks need XFS or btrfs below it; otherwise set raw_capture = "quiet"',
            ) from error
        except CaptureError:
            _close(fd)
            raise
        return cls(fd, device.loop_offset, device.size_bytes, taken_ns)

    def read_blocks(self, block: int, count: int) -> bytes:
        """Blocks of the clone, the last one padded with zeros; StorageError if it is cut off."""
        offset = block * BLOCK_BYTES
        length = min(count * BLOCK_BYTES, self._size_bytes - offset)
        data = os.pread(self._fd, length, self._offset_bytes + offset)
        if len(data) < length:
            raise StorageError(f"the clone of the image ends within block {block} and {count} more")
        return data.ljust(count * BLOCK_BYTES, b"\0")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)


def _check_same(device: Device, image: str, fd: int) -> None:
    """The path may lead to another file by now than the one that the device was set up with."""
    found = os.fstat(fd)
    place = f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}:{found.st_ino}"
    if place != device.identity.backing:
        raise CaptureError(f"{image} is no longer the image behind {device.path}")


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)

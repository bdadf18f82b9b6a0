"""The mount of the recovery points, as the kernel has it."""

import errno
import os
import subprocess

import structlog

from replication.errors import ReplicationError

READ_BYTES_MAX = 1 << 20
STALE_MOUNTS_MAX = 16


def read_ahead(mountpoint: str) -> None:
    """Ask the kernel for whole reads of READ_BYTES_MAX; without the right to, it is only slower."""
    device = os.stat(mountpoint).st_dev
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(READ_BYTES_MAX >> 10))
    except OSError as error:
        structlog.get_logger().debug("read-ahead unchanged", path=path, reason=str(error))


def unmount_stale(mountpoint: str) -> None:
    """Remove the mounts of processes that are gone, also several on top of each other.

    Raises ReplicationError for one that stays.
    """
    for _ in range(STALE_MOUNTS_MAX):
        if not is_stale(mountpoint):
            return
        try:
            subprocess.run(
                ["fusermount3", "-u", "-z", mountpoint], check=True, capture_output=True, timeout=10
            )
        except (OSError, subprocess.SubprocessError) as failure:
            raise ReplicationError(
                f"cannot remove the stale mount at {mountpoint}: {failure}",
                hint=f"run: umount -l {mountpoint}",
            ) from failure


def is_stale(mountpoint: str) -> bool:
    """Whether nobody serves what is mounted there. Attributes would not tell: for a second the
    kernel answers them itself.
    """
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False

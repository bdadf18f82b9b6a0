"""The mount of the recovery points, as the kernel has it."""

import errno
import os
import subprocess

import structlog

from replication.errors import ReplicationError

READ_BYTES_MAX = 1 << 20


def read_ahead(mountpoint: str) -> None:
    """Ask the kernel for whole reads of READ_BYTES_MAX; without the right to, it is only slower."""
    device = os.stat(mountpoint).st_dev
    path = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb"
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(str(READ_BYTES_MAX >> 10))
    except OSError as error:
        structlog.get_logger().warning("read-ahead unchanged", path=path, reason=str(error))


def unmount_stale(mountpoint: str) -> None:
    """Remove the mount of a process that is gone: its folder answers ENOTCONN."""
    try:
        os.stat(mountpoint)
    except OSError as error:
        if error.errno != errno.ENOTCONN:
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

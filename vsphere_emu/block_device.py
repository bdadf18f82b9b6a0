"""Loop devices, file systems and mounts, looked up in the kernel and never remembered.

The kernel's own tables say what is attached and mounted, so that whatever was left half done is
found by the next run.
"""

import contextlib
import errno
import fcntl
import glob
import os
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass

from daemon.durable import storage_error
from replication.errors import StorageError
from vsphere_emu.tool import run_tool, tail, try_tool

BUSY_SECONDS_MAX = 10.0
BUSY_INTERVAL_SECONDS = 0.1
FITHAW = 0xC0045878  # linux/fs.h: _IOWR('X', 120, int)
SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32): XFS_IOC_GOINGDOWN, EXT4_IOC_SHUTDOWN
SHUTDOWN_AT_ONCE = 2  # XFS_FSOP_GOING_FLAGS_NOLOGFLUSH, EXT4_GOING_FLAGS_NOLOGFLUSH
_DELETED = " (deleted)"
_OCTAL = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the mount table.

    device: its source, such as /dev/loop3; point: where it is mounted.
    """

    device: str
    point: str
    file_system: str


def loops_of(path: str) -> tuple[str, ...]:
    """The loop devices behind which ``path`` lies, also if it has been deleted since."""
    wanted = os.path.realpath(path)
    found = []
    for name in glob.glob("/sys/block/loop*/loop/backing_file"):
        try:
            with open(name) as file:
                backing = file.read().rstrip("\n")
        except OSError:
            continue  # detached between the listing and the reading
        if backing.removesuffix(_DELETED) == wanted:
            found.append("/dev/" + name.split("/")[3])
    return tuple(sorted(found))


def attach(path: str) -> str:
    """The loop device over ``path``; made if there is none. Its I/O goes through the page cache."""
    if found := loops_of(path):
        return found[0]
    return run_tool("losetup", "--find", "--show", "--direct-io=off", path).strip()


def begin_detach(path: str) -> tuple[str, ...]:
    """Have every loop device over ``path`` go as soon as the last one closes it; returns them.

    Who has it open can see that: ``loop/autoclear`` is 1 then.
    """
    found = loops_of(path)
    for device in found:
        try_tool("losetup", "--detach", device)  # detached meanwhile is fine
    return found


def forget_partitions(devices: Sequence[str]) -> None:
    """Of loop devices that were detached while a partition was in use: it outlives them."""
    for device in devices:
        name = os.path.basename(device)
        if _partitions(device) and not os.path.exists(f"/sys/block/{name}/loop/backing_file"):
            try_tool("partx", "--delete", device)


def detach(path: str) -> None:
    """Detach every loop device over ``path`` and make the file durable; fine if there is none.

    Raises StorageError when one is still open somewhere after BUSY_SECONDS_MAX; the kernel then
    detaches it as soon as the last one closes it.
    """
    for device in loops_of(path):
        if _partitions(device):
            try_tool("partx", "--delete", device)  # they would outlive what they are parts of
    begin_detach(path)
    deadline = time.monotonic() + BUSY_SECONDS_MAX
    while remaining := loops_of(path):
        if time.monotonic() > deadline:
            raise StorageError(
                f"{remaining[0]} over {path} is still open", hint=_holders(remaining[0])
            )
        time.sleep(BUSY_INTERVAL_SECONDS)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        raise storage_error("sync", path, error) from error
    finally:
        os.close(fd)


def first_partition(device: str) -> str | None:
    """The device node of the first partition of ``device``; None if it has no partition table.

    The table is read by ``partx`` and told to the kernel, which need not know any itself.
    """
    done = try_tool("blkid", "--probe", "--output", "value", "--match-tag", "PTTYPE", device)
    if not done.stdout.strip():
        return None
    if not _partitions(device):
        added = try_tool("partx", "--add", device)  # by another meanwhile is fine: looked up below
        if not _partitions(device):
            raise StorageError(f"{device} has a partition table, but no partition: {tail(added)}")
    name = os.path.basename(device)
    node = f"{device}p1"
    try:
        with open(f"/sys/block/{name}/{name}p1/dev") as file:
            major, minor = map(int, file.read().split(":"))
        with contextlib.suppress(FileExistsError):  # devtmpfs or udev has made it
            os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(major, minor))
    except OSError as error:
        raise storage_error("find the first partition of", device, error) from error
    return node


def _partitions(device: str) -> list[str]:
    """The kernel's names of the partitions that it knows of."""
    name = os.path.basename(device)
    found = glob.glob(f"/sys/block/{name}/{name}p*/partition")
    return sorted(path.split("/")[4] for path in found)


def file_system_of(device: str) -> str:
    """The type of the file system that ``device`` holds, read from the device; "" if none."""
    done = try_tool("blkid", "--probe", "--output", "value", "--match-tag", "TYPE", device)
    return done.stdout.strip()


def make_file_system(device: str, kind: str) -> None:
    """Put an empty file system on the whole device, whatever was there.

    ext4's tables are written at once: its background initialisation would dirty an idle disk.
    """
    command = {
        "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
        "xfs": ("mkfs.xfs", "-q", "-f"),
        "btrfs": ("mkfs.btrfs", "-q", "-f"),
    }[kind]
    run_tool(*command, device)
    run_tool("blockdev", "--flushbufs", device)


def mounts() -> tuple[Mount, ...]:
    """The mount table, oldest first. Source: proc(5), mountinfo."""
    found = []
    with open("/proc/self/mountinfo") as file:
        for line in file:
            left, _, right = line.rstrip("\n").partition(" - ")
            kind, source = right.split(" ")[:2]
            found.append(Mount(_unescape(source), _unescape(left.split(" ")[4]), kind))
    return tuple(found)


def mounted_at(point: str) -> Mount | None:
    """What is mounted at ``point``, the topmost."""
    wanted = os.path.realpath(point)
    return next((one for one in reversed(mounts()) if one.point == wanted), None)


def mount(device: str, point: str, kind: str, options: str) -> None:
    """Mount ``device`` at ``point``; fine if that is so already."""
    present = mounted_at(point)
    if present is not None:
        if present.device == device:
            return
        raise StorageError(
            f"{present.device} is mounted at {point}, where {device} should be",
            hint=f"umount {point}",
        )
    run_tool("mount", "-t", kind, "-o", options, device, point)


def unmount(point: str) -> None:
    """Unmount ``point``, which writes all of it out; fine if nothing is mounted there.

    Raises StorageError naming who holds it after BUSY_SECONDS_MAX.
    """
    deadline = time.monotonic() + BUSY_SECONDS_MAX
    while mounted_at(point) is not None:
        done = try_tool("umount", point)
        if done.returncode != 0 and mounted_at(point) is not None:
            if time.monotonic() > deadline:
                raise StorageError(
                    f"cannot unmount {point}: {done.stderr.strip()}", hint=_holders(point)
                )
            time.sleep(BUSY_INTERVAL_SECONDS)


def cut_off(point: str) -> int | None:
    """What is mounted at ``point`` reaches its disk no more, as in a power cut.

    Whoever waits for it gets an error. If it was frozen it still is, and only who has it open can
    thaw it: returns a descriptor for ``thaw``. None if nothing is mounted there, or nobody is let
    in any more. Nothing happens to a kind that cannot be cut off.
    """
    fd = _opened(point) if mounted_at(point) is not None else None
    if fd is not None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, SHUTDOWN, SHUTDOWN_AT_ONCE.to_bytes(4, "little"))
    return fd


def thaw(fd: int) -> None:
    """Thaw what ``fd`` lies on, if it is frozen, and close it."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(fd, FITHAW, 0)
    os.close(fd)


def unmount_by_force(point: str) -> None:
    """Unmount ``point`` though it is frozen or held: its name is gone now, it when released."""
    if mounted_at(point) is None:
        return
    fd = _opened(point)
    if fd is not None:
        thaw(fd)
    try:
        unmount(point)
    except StorageError:
        while mounted_at(point) is not None:
            run_tool("umount", "--lazy", point)


def _opened(point: str) -> int | None:
    """The root of what is mounted there; None where it is cut off already and lets nobody in."""
    try:
        return os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EIO:
            raise storage_error("open", point, error) from error
        return None


def _holders(path: str) -> str:
    """Who has something open on ``path`` or below it, for a person to end."""
    found = []
    for link in (
        *glob.glob("/proc/[0-9]*/fd/*"),
        *glob.glob("/proc/[0-9]*/cwd"),
        *glob.glob("/proc/[0-9]*/root"),
    ):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target == path or target.startswith(path + "/"):
            found.append(link.split("/")[2])
    return (
        f"held by process {', '.join(sorted(set(found), key=int))}" if found else "held by nobody"
    )


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)

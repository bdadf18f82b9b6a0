"""Which mounted file systems lie on a disk: those that must be frozen for a point in time.

A disk's file systems may lie on itself, on its partitions, and on device mapper or RAID volumes
above either; a btrfs may have it as any of its members.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from replication.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from agents.mobility.device import Named

MOUNTINFO = "/proc/self/mountinfo"

_ESCAPE = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: a file system, or a part of it, at one place.

    ``dev``: the file system's "major:minor", which for btrfs is no disk's. ``read_only``: the file
    system itself is, not merely this mount of it.
    """

    mount_id: int
    dev: str
    mount_point: str
    fs_type: str
    source: str
    read_only: bool


@dataclass(frozen=True, slots=True)
class MountedFileSystem:
    """One file system and a place by which it can be reached."""

    mount_point: str
    fs_type: str
    source: str
    dev: str
    read_only: bool


def parse_mountinfo(text: str) -> list[Mount]:
    """Read /proc/<pid>/mountinfo; source: proc_pid_mountinfo(5).

    Fields: mount id, parent id, major:minor, root, mount point, mount options, optional fields, a
    lone hyphen, file system type, source, file system options; blanks are octal escapes.
    """
    mounts = []
    for line in text.splitlines():
        fields = line.split(" ")
        hyphen = fields.index("-", 6)
        fs_type, source, options = fields[hyphen + 1 : hyphen + 4]
        mounts.append(
            Mount(
                mount_id=int(fields[0]),
                dev=fields[2],
                mount_point=_unescaped(fields[4]),
                fs_type=_unescaped(fs_type),
                source=_unescaped(source),
                read_only="ro" in options.split(","),
            )
        )
    return mounts


def read_mounts() -> list[Mount]:
    """All mounts that this process sees."""
    with open(MOUNTINFO, errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def mounts_on(name: str, mounts: Sequence[Mount]) -> list[Mount]:
    """Those of ``mounts`` whose file system lies on the disk with the kernel's name ``name``."""
    names = _names_on(name)
    devs = {_sysfs_dev(name) for name in names}
    return [
        mount
        for mount in mounts
        if mount.dev in devs or (mount.dev.startswith("0:") and bool(_source_names(mount) & names))
    ]


def mounted_file_systems(device: Named) -> list[MountedFileSystem]:
    """Every file system on the disk that is mounted where this process can see it, each once.

    Raises CaptureError where another mount covers all places of one of them: whoever opened such
    a place would freeze the wrong file system.
    """
    by_dev: dict[str, list[Mount]] = {}
    for mount in mounts_on(device.name, read_mounts()):
        by_dev.setdefault(mount.dev, []).append(mount)
    found = []
    for places in by_dev.values():
        reachable = next((place for place in places if _is_reachable(place)), None)
        if reachable is None:
            raise CaptureError(
                f"the {places[0].fs_type} at {places[0].mount_point} is covered by another mount",
                hint="unmount what is above it, or mount it a second time elsewhere",
            )
        found.append(
            MountedFileSystem(
                mount_point=reachable.mount_point,
                fs_type=reachable.fs_type,
                source=reachable.source,
                dev=reachable.dev,
                read_only=reachable.read_only,
            )
        )
    return found


def _unescaped(field: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), field)


def _names_on(name: str) -> set[str]:
    """The kernel's names of a disk, its partitions and the volumes above them."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        folder = f"/sys/class/block/{name}"
        waiting += [
            entry for entry in _listed(folder) if os.path.exists(f"{folder}/{entry}/partition")
        ]
        waiting += _listed(f"{folder}/holders")
    return found


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:  # a partition or a volume that has just gone has nothing on it
        return []


def _sysfs_dev(name: str) -> str:
    try:
        with open(f"/sys/class/block/{name}/dev") as file:
            return file.read().strip()
    except OSError:
        return ""


def _source_names(mount: Mount) -> set[str]:
    """Names of the disks below a file system that has a number of its own (btrfs)."""
    try:
        number = os.stat(mount.source).st_rdev
    except OSError:
        return set()
    path = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    if number == 0 or not os.path.exists(path):
        return set()
    name = os.path.basename(os.path.realpath(path))
    members = [set(_listed(f"{folder}/devices")) for folder in _btrfs_folders()]
    return {name}.union(*(member for member in members if name in member))


def _btrfs_folders() -> Iterator[str]:
    for entry in _listed("/sys/fs/btrfs"):
        yield f"/sys/fs/btrfs/{entry}"


def _is_reachable(mount: Mount) -> bool:
    """Whether opening the mount point leads to this mount and not to one above it."""
    try:
        fd = os.open(mount.mount_point, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with open(f"/proc/self/fdinfo/{fd}") as file:
            return f"mnt_id:\t{mount.mount_id}\n" in file.read()
    finally:
        os.close(fd)

"""This machine's disks, for an operator to choose from, and which of them is meant later on.

A disk is known by a name that a restart does not change: by the link in /dev/disk/by-id where there
is one, a loop device by its image, otherwise by its path. So one that was sdb and is sdc now is
still found.

Source: docs/CONTROL.md §5; /sys/block as in the kernel's Documentation/ABI/stable/sysfs-block.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from agents.mobility.freeze import refuse_own
from agents.mobility.mounts import Mount, mounted_file_systems, mounts_on, read_mounts
from agents.mobility.tracker import reason_untrackable
from replication.control.report import DEVICES_MAX, BlockDevice
from replication.errors import CaptureError, ConfigError

SYSFS = "/sys/block"
BY_ID = "/dev/disk/by-id"
SECTOR_BYTES = 512
"""The unit of sysfs, whatever the disk's own is."""

PASSED_OVER = ("sr", "fd", "ram", "zram")
"""What nobody replicates: optical and floppy drives, disks in memory."""

SYSTEM_MOUNTS = ("/", "/boot", "/boot/efi", "/efi", "/usr")

MOUNTS_MAX = 64
"""Places of one disk that are told."""

ID_KINDS = ("wwn-", "nvme-eui.", "nvme-uuid.", "scsi-", "nvme-", "ata-", "virtio-", "dm-uuid-")
"""Kinds of links, those that say most about the disk itself first; others come after."""


@dataclass(frozen=True, slots=True)
class FoundDisk:
    """What the system tells of a disk.

    links:   names in /dev/disk/by-id that lead to it.
    backing: a loop device's image, else empty; ``offset_bytes``: where in it the disk begins.
    """

    name: str
    size_bytes: int
    links: tuple[str, ...] = ()
    backing: str = ""
    offset_bytes: int = 0
    mount_points: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return f"/dev/{self.name}"

    @property
    def is_system(self) -> bool:
        return any(point in SYSTEM_MOUNTS for point in self.mount_points)


def stable_id(disk: FoundDisk) -> str:
    """A name for the disk that outlives a restart, as far as the system has one."""
    if disk.backing:
        backing = printable(disk.backing)
        return f"{backing}@{disk.offset_bytes}" if disk.offset_bytes else backing
    if disk.links:
        return f"{BY_ID}/{min(disk.links, key=_rank)}"
    return disk.path


def _rank(link: str) -> tuple[int, int, str]:
    kind = next((n for n, kind in enumerate(ID_KINDS) if link.startswith(kind)), len(ID_KINDS))
    return kind, len(link), link


def printable(name: str) -> str:
    """A name of the file system as text that can be sent, whatever bytes it holds."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def describe(disks: Sequence[FoundDisk]) -> tuple[BlockDevice, ...]:
    """The disks as they are told, by path; a name that two of them have is none."""
    counts = Counter(stable_id(disk) for disk in disks)
    return tuple(
        BlockDevice(
            id=stable_id(disk) if counts[stable_id(disk)] == 1 else disk.path,
            device=disk.path,
            size_bytes=disk.size_bytes,
            mounts=tuple(printable(point) for point in disk.mount_points[:MOUNTS_MAX]),
            is_system=disk.is_system,
        )
        for disk in sorted(disks, key=lambda disk: (len(disk.name), disk.name))
    )


def find(devices: Iterable[BlockDevice], wanted: str) -> BlockDevice | None:
    """The disk that is meant by an id, a path or a link to one; None when it is not there."""
    names = (wanted, os.path.realpath(wanted))
    by_path = None
    for device in devices:
        if device.id in names:
            return device
        if device.device in names:
            by_path = device
    return by_path


def read_inventory(
    *, tracker: str, state_folder: str, only: Sequence[str] = ()
) -> tuple[BlockDevice, ...]:
    """The disks that this machine has now.

    only: names of the disks that count, as ``find`` takes them; none: all that there are.
    """
    mounts = read_mounts()
    links = _links()
    disks = [
        found
        for name in sorted(os.listdir(SYSFS))
        if (found := _look_at(name, links.get(name, ()), mounts)) is not None
    ]
    devices = describe(disks)
    if only:
        wanted = {device.id for name in only if (device := find(devices, name)) is not None}
        devices = tuple(device for device in devices if device.id in wanted)
    return tuple(
        device.model_copy(update={"reason": _reason(device, tracker, state_folder)})
        for device in devices[:DEVICES_MAX]
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A disk as mounts and trackers know it."""

    path: str
    name: str


def _reason(device: BlockDevice, tracker: str, state_folder: str) -> str:
    place = _Place(device.device, os.path.basename(device.device))
    try:
        reason = reason_untrackable(place) if tracker == "ebpf" else None
        if reason is None:
            writable = [fs for fs in mounted_file_systems(place) if not fs.read_only]
            refuse_own(writable, [state_folder])
    except ConfigError as error:
        reason = str(error)
    except (CaptureError, OSError):
        # A mount above another one shows in the points; a disk that has just gone, next time.
        reason = None
    return reason or ""


def _look_at(name: str, links: Sequence[str], mounts: Sequence[Mount]) -> FoundDisk | None:
    """A disk by the kernel's name; None when it is none that anybody replicates."""
    size_bytes = int(_text(name, "size") or "0") * SECTOR_BYTES
    if name.startswith(PASSED_OVER) or not size_bytes or _text(name, "hidden") == "1":
        return None
    found = FoundDisk(
        name,
        size_bytes,
        tuple(links),
        backing=_text(name, "loop/backing_file"),
        offset_bytes=int(_text(name, "loop/offset") or "0"),
    )
    points = sorted({mount.mount_point for mount in mounts_on(name, mounts)})
    return replace(found, mount_points=tuple(points))


def _links() -> dict[str, list[str]]:
    """Names in /dev/disk/by-id of each whole disk."""
    found: dict[str, list[str]] = {}
    try:
        entries = os.listdir(BY_ID)
    except OSError:  # no udev, or no disk with a name
        return found
    for entry in entries:
        target = os.path.basename(os.path.realpath(os.path.join(BY_ID, entry)))
        found.setdefault(target, []).append(entry)
    return found


def _text(name: str, file: str) -> str:
    try:
        with open(f"{SYSFS}/{name}/{file}", errors="surrogateescape") as opened:
            return opened.read().strip()
    except OSError:
        return ""

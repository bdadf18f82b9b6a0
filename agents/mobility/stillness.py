"""Whether anything was written to a disk between two moments, by the kernel's I/O counters.

The tracker's bits say which blocks changed; a second write to a block that is marked already leaves
no trace in them. Where file systems are frozen there is none, but a disk may have other writers:
a database on a raw partition beside them, swap, a file system that was mounted a moment ago or
that another mount namespace alone can see. The counters show them all.

Source: Documentation/block/stat.rst and Documentation/ABI/stable/sysfs-block in Linux.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agents.mobility.device import Device
from replication.errors import CaptureError

_WRITES, _DISCARDS = 4, 11


@dataclass(frozen=True, slots=True)
class WriteCounts:
    """A look at the counters of one disk.

    completed: writes and discards that have ended since the kernel knows the disk.
    under_way: those that a driver has begun and not ended.
    """

    completed: int
    under_way: int

    @classmethod
    def of(cls, device: Device) -> "WriteCounts":
        """Raise CaptureError where the kernel does not count."""
        folder = f"/sys/block/{device.name}"
        try:
            counted = _fields(f"{folder}/queue/iostats")[0]
            # In this order: a write that ends between the two is counted by the time it is over.
            under_way = _fields(f"{folder}/inflight")[1]
            stat = _fields(f"{folder}/stat")
        except OSError as error:
            raise CaptureError(f"{folder} tells no counts of writes: {error.strerror}") from error
        if not counted:
            raise CaptureError(
                f"the kernel does not count the writes of {device.path}",
                hint=f"echo 1 > {folder}/queue/iostats",
            )
        return cls(stat[_WRITES] + stat[_DISCARDS], under_way)


def look(devices: Sequence[Device]) -> list[WriteCounts]:
    """The counters of all disks now."""
    return [WriteCounts.of(device) for device in devices]


def stood_still(before: WriteCounts, after: WriteCounts) -> bool:
    """Whether nothing was written, not even in part, from one look to the other."""
    return before.completed == after.completed and not after.under_way


def _fields(path: str) -> list[int]:
    with open(path) as file:
        return [int(field) for field in file.read().split()]

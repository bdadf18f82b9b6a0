"""How large a machine is at the second site, and whether it may be so large."""

import os
from collections.abc import Sequence

from appliance.applier.config import ApplierConfig
from replication.bookmark import DiskShape


def used_bytes(folder: str) -> int:
    """What the files below take on the disk; some may go while they are looked at."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def exceeded(config: ApplierConfig, folder: str, disks: Sequence[DiskShape]) -> str:
    """Which limit a machine with these disks is beyond, in words; empty when it is beyond none."""
    for disk in disks:
        if disk.size_bytes > config.disk_bytes_max:
            return (
                f"disk {disk.index} has {disk.size_bytes} bytes, more than disk_bytes_max "
                f"({config.disk_bytes_max}): nothing of the machine is applied"
            )
    most = config.machine_space_bytes_max
    if most is not None and (found := used_bytes(folder)) > most:
        return (
            f"its store takes {found} bytes, more than machine_space_bytes_max ({most}): nothing "
            "more is applied"
        )
    return ""

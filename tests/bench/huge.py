"""What a disk of 1 TiB costs that holds next to nothing: metadata alone."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from azure_emu.compute import disk as overlay
from azure_emu.compute.disk import disks_of
from replication.control.recovery import SourceDisk
from tests.bench.figure import NoTarget, Row
from tests.bench.memory import Watched
from tests.bench.place import GIB, MIB, Place
from tests.e2e.disk import Disk
from tests.e2e.rig import Rig

SIZE_BYTES = 1024 * GIB
PLACES = 64
SECONDS_MAX = 900.0


def measure(where: Place) -> list[Row]:
    """A sparse disk of 1 TiB through the whole path: time, memory and metadata."""
    size_bytes = SIZE_BYTES // (8 if where.quick else 1)
    with where.rig() as rig:
        disk = rig.add_disk(size_bytes)
        _write(disk, MIB)
        rig.configure()
        rig.azure.start()
        watched = [Watched(part) for part in (rig.process_server, rig.applier, rig.agent)]
        for one in watched:
            one.part.start()
        began = time.monotonic()
        rig.wait_until("the first point", rig.points, SECONDS_MAX)
        first_seconds = time.monotonic() - began
        began, before = time.monotonic(), len(rig.points())
        _write(disk, 4096)
        rig.wait_until("one more point", lambda: len(rig.points()) > before, SECONDS_MAX)
        next_seconds = time.monotonic() - began
        kept = {"store": _taken(rig.store), "agent's state": _taken(rig.agent_state)}
        overlay_seconds = _overlay_seconds(where.folder, rig, size_bytes)
        peaks = {one.part.name: one.peak_bytes / MIB for one in watched}
    shape = f"sparse disk of {size_bytes / GIB:,.0f} GiB with {PLACES} MiB of data"
    return [
        Row(f"{shape}: to its first point", "s", NoTarget(), first_seconds),
        Row(f"{shape}: {PLACES} blocks written to the next point", "s", NoTarget(), next_seconds),
        Row(
            f"{shape}: its newest point to a disk that can be written",
            "s",
            NoTarget(),
            overlay_seconds,
        ),
        *(
            Row(f"{shape}: room taken by the {name}", "MiB", NoTarget(), taken / MIB)
            for name, taken in kept.items()
        ),
        *(
            Row(f"{shape}: peak resident of {name}", "MiB", NoTarget(), peak)
            for name, peak in sorted(peaks.items())
        ),
    ]


def _write(disk: Disk, count_bytes: int) -> None:
    """Something of so many bytes in each of PLACES places, from end to end."""
    with open(disk.device, "r+b") as device:
        for number in range(PLACES):
            device.seek(number * (disk.size_bytes // PLACES))
            device.write(os.urandom(count_bytes))
        device.flush()
        os.fsync(device.fileno())


def _taken(folder: Path) -> int:
    """Bytes of disk that a folder's files take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def _overlay_seconds(folder: Path, rig: Rig, size_bytes: int) -> float:
    """With the view of the point: the first to open it is the overlay's maker."""
    points = folder / "points"
    points.mkdir()
    command = [sys.executable, "-m", "appliance.cli", "mount", str(points)]
    with subprocess.Popen([*command, "--store", str(rig.store)]) as mounted:
        try:
            rig.wait_until("the folder of points", points.is_mount)
            (machine,) = points.iterdir()
            file = f"{machine.name}/latest/disk0.img"
            source = SourceDisk(index=0, name="d", size_bytes=size_bytes, source=file)
            began = time.monotonic()
            made = disks_of(str(folder / "vm"), str(points), [source])
            asyncio.run(overlay.make_disks(made))
            command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 1 {size_bytes - 512} 512"]
            subprocess.run([*command, made[0].path], check=True, capture_output=True)
            return time.monotonic() - began
        finally:
            mounted.terminate()

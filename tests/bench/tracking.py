"""What the tracker costs a writer: fio on a loop device, tracker on and off in pairs."""

import json
import statistics
import subprocess
import tempfile
import uuid
from contextlib import ExitStack
from pathlib import Path

from agents.mobility.device import Device
from agents.mobility.tracker.ebpf import EbpfTracker
from replication.errors import StorageError
from tests.bench.figure import AtLeast, AtMost, Row, spread
from tests.bench.place import MIB, Place, write_random
from tests.e2e.disk import Disk

DISK_BYTES = 1024 * MIB
QUEUE_DEPTH = 8
MEMORY = "/dev/shm"
"""The image lies in memory: the quicker the device, the more the tracker shows."""


def measure(where: Place) -> list[Row]:
    """Tracking: fio's 4 KiB random writes on a loop device with the tracker on and off."""
    pairs, seconds = (3, 2) if where.quick else (9, 5)
    on: list[tuple[float, float]] = []
    off: list[tuple[float, float]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        disk = Disk(folder, 0, DISK_BYTES)
        stack.callback(disk.detach)
        disk.attach()
        write_random(disk.image, DISK_BYTES)  # every page is there: no run pays for allocation
        device = Device.open(disk.device)
        stack.callback(device.close)
        _fio(disk.device, 1)
        for pair in range(pairs):
            for tracked in (pair % 2 == 0, pair % 2 == 1):
                where.rest()
                if not tracked:
                    off.append(_fio(disk.device, seconds))
                    continue
                tracker = EbpfTracker.attach(uuid.uuid4(), 0, device)
                try:
                    on.append(_fio(disk.device, seconds))
                    assert tracker.peek(), "the tracker saw nothing"
                finally:
                    tracker.remove()
    iops = [one[0] / other[0] for one, other in zip(on, off, strict=True)]
    latency = [one[1] / other[1] for one, other in zip(on, off, strict=True)]
    noise = [one[0] / other[0] for one, other in zip(off[1:], off[:-1], strict=True)]
    return [
        Row(
            figure="tracking: 4 KiB random writes, IOPS on/off",
            unit="of off",
            target=AtLeast(0.97),
            measured=statistics.median(iops),
            note=f"{len(on)} pairs, {spread(iops)}; {statistics.median(o[0] for o in off):,.0f} "
            f"IOPS without; without against without {spread(noise)}",
        ),
        Row(
            figure="tracking: p99 latency on/off",
            unit="of off",
            target=AtMost(1.05),
            measured=statistics.median(latency),
            note=f"{spread(latency)}; {statistics.median(o[1] for o in off):,.0f} µs without",
        ),
    ]


def _fio(device: str, seconds: int) -> tuple[float, float]:
    """IOPS, and the p99 of the completion latency in microseconds."""
    done = subprocess.run(
        [
            "fio",
            "--name=bench",
            f"--filename={device}",
            "--rw=randwrite",
            "--bs=4k",
            "--direct=1",
            "--ioengine=libaio",
            f"--iodepth={QUEUE_DEPTH}",
            "--time_based",
            f"--runtime={seconds}",
            "--norandommap",
            "--output-format=json",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise StorageError(f"fio failed: {done.stderr.strip()}", hint="make setup installs fio")
    write = json.loads(done.stdout)["jobs"][0]["write"]
    return float(write["iops"]), write["clat_ns"]["percentile"]["99.000000"] / 1000

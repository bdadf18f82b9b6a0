"""Resident memory of the three daemons while a disk is replicated for the first time."""

import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.figure import AtMost, Row, shown
from tests.bench.place import GIB, MIB, PATTERN_BYTES, ClonedDisk, Place
from tests.e2e.part import Part
from tests.e2e.rig import Rig

SAMPLE_SECONDS = 0.25
SECONDS_MAX = 1800.0
SPOOL_BYTES = 2 * GIB
TARGETS = {"agent": 150, "process-server": 200, "applier": 200}


@dataclass(slots=True)
class Watched:
    """A daemon whose memory is looked at from time to time."""

    part: Part
    idle_bytes: int = 0
    with_children_bytes: int = 0

    def look(self) -> None:
        pids = [self.part.pid]
        for pid in pids:
            try:
                text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
            except FileNotFoundError:
                continue
            pids += map(int, text.split())
        total = sum(_status_bytes(pid, "VmRSS") for pid in pids)
        self.with_children_bytes = max(self.with_children_bytes, total)

    @property
    def peak_bytes(self) -> int:
        """The kernel's own high-water mark of the daemon itself."""
        return _status_bytes(self.part.pid, "VmHWM")


def measure(where: Place) -> list[Row]:
    """Resident memory during the initial replication of a 4 GiB and of a 16 GiB disk."""
    sizes = [1] if where.quick else [4, 16]
    where.need_bytes(2 * max(sizes) * GIB + SPOOL_BYTES + PATTERN_BYTES)
    return [row for size in sizes for row in _rows(where, size)]


def _rows(where: Place, gibibytes: int) -> list[Row]:
    with where.rig(process_server={"spool": {"bytes_max": SPOOL_BYTES}}) as rig:
        disk = ClonedDisk(rig.folder, 0, gibibytes * GIB)
        rig.disks.append(disk)
        disk.attach()
        rig.configure()
        rig.azure.start()
        watched = [Watched(part) for part in (rig.process_server, rig.applier, rig.agent)]
        for one in watched:
            one.part.start()
            one.idle_bytes = one.part.resident_bytes()
        began = time.monotonic()
        _watch(rig, watched)
        seconds = time.monotonic() - began
        return [
            Row(
                figure=f"{one.part.name}: peak resident, initial replication of {gibibytes} GiB",
                unit="MiB",
                target=AtMost(TARGETS[one.part.name]),
                measured=one.peak_bytes / MIB,
                limit=one.idle_bytes / MIB,
                limit_is="the same daemon just started",
                note=f"with its children at most {shown(one.with_children_bytes / MIB)} MiB; "
                f"{gibibytes * GIB / seconds / 1e6:.0f} MB/s to the point",
            )
            for one in sorted(watched, key=lambda one: one.part.name)
        ]


def _watch(rig: Rig, watched: list[Watched]) -> None:
    deadline = time.monotonic() + SECONDS_MAX
    while not rig.points():
        dead = [one.part.name for one in watched if not one.part.is_alive]
        assert not dead, f"{dead} died\n{rig.report()}"
        assert time.monotonic() < deadline, f"no point in {SECONDS_MAX:.0f} s\n{rig.report()}"
        for one in watched:
            one.look()
        time.sleep(SAMPLE_SECONDS)


def _status_bytes(pid: int, field: str) -> int:
    """A field of proc_pid_status(5); 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)

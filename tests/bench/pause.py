"""Freezes under a full pgbench load, and what replication costs pgbench."""

import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.bench.cpu import cpu_of
from tests.bench.figure import AtLeast, AtMost, Row, percentile, spread
from tests.bench.place import MIB, Place
from tests.e2e.disk import Disk
from tests.e2e.rig import Rig
from vsphere_emu.config import DiskConfig, GuestConfig, PgbenchWorkload
from vsphere_emu.datastore import Datastore
from vsphere_emu.guest import Guest
from vsphere_emu.workload.database import USER, find_binaries

SCALE = 20
CLIENTS = 8
SECONDS_MAX = 300.0
SETTLE_SECONDS = 4.0


class GuestDisk(Disk):
    """A disk that a guest has attached and will detach."""

    def attach(self) -> None:
        """Nothing: the guest has done it."""

    def detach(self) -> None:
        """Nothing: the guest does it."""


def measure(where: Place) -> list[Row]:
    """Pause: how long a capture freezes a busy database, and what replication costs it."""
    freezes = 6 if where.quick else 40
    pairs, seconds = (2, 8) if where.quick else (7, 20)
    quicker = {"interval_seconds": 1.0, "pause_share_max": 0.2}
    with where.rig(agent={"capture": quicker}) as rig, _database(rig) as guest:
        rig.start()
        rig.wait_until("the first point", rig.points, SECONDS_MAX)
        guest.start_workload()
        pauses = _pauses(rig, freezes)
        rig.settings["agent"]["capture"] |= {"interval_seconds": 5.0, "pause_share_max": 0.01}
        rig.agent.stop()
        rig.configure()
        shared = _shares(where, rig, guest, pairs, seconds, apart=False)
        apart = _shares(where, rig, guest, pairs, seconds, apart=True)
        guest.stop_workload()
    load = (
        f"pgbench with {CLIENTS} clients, unthrottled; all parts on the same {os.cpu_count()} cores"
    )
    return [
        Row(
            figure="freeze of a capture under pgbench, median",
            unit="ms",
            target=AtMost(50),
            measured=1000 * statistics.median(pauses),
            limit=1000 * min(pauses),
            limit_is="the shortest of them",
            note=f"{len(pauses)} freezes of ext4 and XFS; {load}",
        ),
        Row(
            figure="freeze of a capture under pgbench, p99",
            unit="ms",
            target=AtMost(250),
            measured=1000 * percentile(pauses, 0.99),
            limit=1000 * max(pauses),
            limit_is="the longest of them",
        ),
        *(
            Row(
                figure=f"pgbench with replication, {told}",
                unit="of without",
                target=AtLeast(0.95),
                measured=statistics.median(share for share, _ in found),
                note=f"{len(found)} pairs of {seconds} s, {spread([share for share, _ in found])}; "
                f"{statistics.median(tps for _, tps in found):,.0f} tps without; {profile}",
            )
            for told, (found, profile) in (
                ("all parts on the database's cores", shared),
                ("its parts on another core", apart),
            )
        ),
    ]


@contextlib.contextmanager
def _database(rig: Rig) -> Iterator[Guest]:
    """A guest with PostgreSQL on two disks, its workload not yet started."""
    config = GuestConfig(
        name="db",
        disks=(
            DiskConfig(name="data", size_bytes=2048 * MIB, file_system="ext4"),
            DiskConfig(name="wal", size_bytes=2048 * MIB, file_system="xfs"),
        ),
        workload=PgbenchWorkload(
            kind="pgbench", data_disk="data", wal_disk="wal", scale=SCALE, clients=CLIENTS
        ),
    )
    guest = Guest(
        config, Datastore("bench", str(rig.folder / "datastore")), str(rig.folder / "vsphere")
    )
    try:
        guest.power_on()
        guest.start_workload()  # makes the database
        guest.stop_workload()
        for index, status in enumerate(guest.status().disks):
            disk = GuestDisk(rig.folder, index, status.size_bytes)
            assert status.device is not None
            disk.device = status.device
            disk.image = Path(status.flat_path)
            rig.disks.append(disk)
        yield guest
    finally:
        rig.clean_up()  # nothing freezes any more
        guest.remove_all_traces(delete_disks=True)


def _pauses(rig: Rig, count: int) -> list[float]:
    """Seconds of the next ``count`` freezes, from the agent's records."""
    found: dict[str, float] = {}
    first = {record["changeset"] for record in rig.agent_status()["records"]}

    def enough() -> bool:
        for record in rig.agent_status().get("records", []):
            if record["pause_seconds"] and record["changeset"] not in first:
                found[record["changeset"]] = record["pause_seconds"]
        return len(found) >= count

    rig.wait_until(f"{count} freezes", enough, SECONDS_MAX)
    return list(found.values())


def _shares(
    where: Place, rig: Rig, guest: Guest, pairs: int, seconds: int, *, apart: bool
) -> tuple[list[tuple[float, float]], str]:
    """Transactions with replication over those without, in turn, and those without a second; and
    who used the processors in the last run with it.
    """
    everywhere = os.sched_getaffinity(0)
    first = {min(everywhere)}
    shares: list[tuple[float, float]] = []
    profile = ""
    for pair in range(pairs):
        rates = {}
        for replicating in (pair % 2 == 0, pair % 2 == 1):
            where.rest()
            if replicating:
                rig.agent.start()
                rig.wait_until("capture", lambda: rig.agent_status()["state"] == "replicating")
            pid = guest.status().workload_pid
            assert pid is not None, "the workload has ended"
            _bind([pid], first if apart else everywhere)
            _bind(
                [part.pid for part in rig.parts if part.is_alive],
                everywhere - first if apart else everywhere,
            )
            time.sleep(SETTLE_SECONDS)
            with cpu_of([part for part in rig.parts if part.is_alive]) as cpu:
                rates[replicating] = _transactions_per_second(guest, seconds)
            if replicating:
                profile = cpu.told()
                rig.agent.stop()
        shares.append((rates[True] / rates[False], rates[False]))
    _bind([part.pid for part in rig.parts if part.is_alive], everywhere)
    return shares, profile


def _transactions_per_second(guest: Guest, seconds: int) -> float:
    before, began = _committed(guest), time.monotonic()
    time.sleep(seconds)
    return (_committed(guest) - before) / (time.monotonic() - began)


def _committed(guest: Guest) -> int:
    assert guest.socket_folder is not None
    command = [f"{find_binaries()}/psql", "-XAtq", "-h", guest.socket_folder, "-U", USER, "-c"]
    query = "SELECT xact_commit FROM pg_stat_database WHERE datname = 'postgres'"
    done = subprocess.run([*command, query], check=True, capture_output=True, text=True)
    return int(done.stdout)


def _bind(pids: list[int], cores: set[int]) -> None:
    """Let processes, and all that they have started, run on these cores alone."""
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), cores)
            with contextlib.suppress(FileNotFoundError):
                _bind([int(child) for child in (task / "children").read_text().split()], cores)

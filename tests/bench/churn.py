"""A changeset of 1 % of a disk, an idle agent, and the RPO under steady churn."""

import json
import os
import random
import signal
import ssl
import statistics
import subprocess
import time
import urllib.request
from pathlib import Path

from replication.stream import StreamState, state_path
from tests.bench import plain
from tests.bench.figure import AtMost, Row, percentile, spread
from tests.bench.place import GIB, MIB, Place
from tests.e2e.rig import Rig

BLOCK_BYTES = 4096
CHURN_BYTES_PER_SECOND = 20_000_000
SECONDS_MAX = 300.0


def measure_delta(where: Place) -> list[Row]:
    """1 % random 4 KiB blocks of a 4 GiB disk, from capture to restorable; and an idle agent."""
    size_bytes = (1 if where.quick else 4) * GIB
    idle_seconds = 10.0 if where.quick else 30.0
    with where.rig() as rig:
        disk = rig.add_disk(size_bytes)
        rig.start()
        rig.wait_until("the first point", rig.points, SECONDS_MAX)
        took, limits = [], []
        for _ in range(2 if where.quick else 5):
            time.sleep(6.0)  # the interval between changesets has passed: the next is due at once
            where.rest()
            took.append(_restorable_after(rig, disk.device, size_bytes // BLOCK_BYTES // 100))
            sent = rig.agent_status()["records"][-1]["sent_bytes"]
            limits.append(
                plain.blob_round_trip(
                    (rig.folder / "connection").read_text(), body_bytes=sent // 6, count=6
                )
            )
        rig.wait_until("quiet", lambda: rig.agent_status()["unapplied_count"] == 0)
        time.sleep(6.0)
        before = _cpu_seconds(rig.agent.pid)
        time.sleep(idle_seconds)
        idle = (_cpu_seconds(rig.agent.pid) - before) / idle_seconds
    return [
        Row(
            figure=f"1 % random blocks of {size_bytes // GIB} GiB, capture to restorable",
            unit="s",
            target=AtMost(3.0),
            measured=statistics.median(took),
            limit=statistics.median(limits),
            limit_is="blob client alone puts and gets the same bytes",
            note=spread(took),
        ),
        Row(
            figure="idle agent, share of a core",
            unit="%",
            target=AtMost(0.5),
            measured=100 * idle,
            note=f"over {idle_seconds:.0f} s, with the process that freezes",
        ),
    ]


def _restorable_after(rig: Rig, device: str, count: int) -> float:
    """Write random blocks while the agent stands still; seconds from its waking to the point.

    Otherwise it would take up the first of them in a changeset of its own.
    """
    os.kill(rig.agent.pid, signal.SIGSTOP)
    try:
        blocks = rig.disks[0].size_bytes // BLOCK_BYTES
        chosen = random.sample(range(blocks), count)
        fd = os.open(device, os.O_WRONLY)
        try:
            for block in chosen:
                os.pwrite(fd, os.urandom(BLOCK_BYTES), block * BLOCK_BYTES)
            os.fsync(fd)
        finally:
            os.close(fd)
        written_ns = time.time_ns()
    finally:
        os.kill(rig.agent.pid, signal.SIGCONT)
    point = rig.wait_for_point(SECONDS_MAX, after_ns=written_ns)
    assert point.changed_bytes >= count * BLOCK_BYTES, (
        "the changeset does not hold what was written"
    )
    return (point.applied_ns - written_ns) / 1e9


def _cpu_seconds(pid: int) -> float:
    """Time on CPU of a process and its children that live."""
    total = 0.0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for one in (pid, *map(int, children)):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def measure_rpo(where: Place) -> list[Row]:
    """RPO durable under 20 MB/s of churn in an ext4 file system."""
    seconds = 20 if where.quick else 60
    samples: list[float] = []
    with where.rig() as rig:
        disk = rig.add_disk(2 * GIB, "ext4")
        rig.start()
        rig.wait_until("the first point", rig.points, SECONDS_MAX)
        context = ssl.create_default_context(cafile=str(rig.folder / "client" / "ca.pem"))
        context.load_cert_chain(
            str(rig.folder / "client" / "certificate.pem"), str(rig.folder / "client" / "key.pem")
        )
        url = f"https://127.0.0.1:{rig.data_port}{state_path(rig.machine)}"
        churn = _start_churn(disk.mount_point, seconds + 10)
        try:
            time.sleep(10)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                with urllib.request.urlopen(url, context=context, timeout=10) as answer:
                    state = StreamState.from_bytes(answer.read())
                samples.append((time.time_ns() - state.durable_ns) / 1e9)
                time.sleep(0.2)
            out, _ = churn.communicate(timeout=60)
        finally:
            churn.kill()
            churn.wait()
        written = json.loads(out)["jobs"][0]["write"]["bw_bytes"]
        records = rig.agent_status()["records"]
    changed = [record["changed_bytes"] / MIB for record in records[1:]]
    taken = [record["taken_seconds"] for record in records[1:]]
    pauses = [record["pause_seconds"] for record in records[1:] if record["pause_seconds"]]
    return [
        Row(
            figure=f"RPO durable under {written / 1e6:.0f} MB/s of churn, p99 of {seconds} s",
            unit="s",
            target=AtMost(8.0),
            measured=percentile(samples, 0.99),
            limit=5.0,
            limit_is="the interval between changesets",
            note=f"median {statistics.median(samples):.1f} s; changesets of "
            f"{statistics.median(changed):.0f} MiB, each {statistics.median(taken):.1f} s; "
            f"freezes, which stretch the interval, in seconds: {spread(pauses or [0.0])}",
        )
    ]


def _start_churn(folder: Path, seconds: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [
            "fio",
            "--name=churn",
            f"--directory={folder}",
            "--size=1g",
            "--rw=randwrite",
            "--bs=16k",
            "--direct=1",
            f"--rate={CHURN_BYTES_PER_SECOND}",
            "--fallocate=none",
            "--time_based",
            f"--runtime={seconds}",
            "--output-format=json",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )

"""What the config server costs while nothing happens, and how soon it answers many agents."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from replication.control.report import REPORT_SECONDS_DEFAULT
from tests.appliance.config_server.identity.test_daemon import Daemon
from tests.bench.figure import AtMost, Row, percentile, shown
from tests.bench.fleet import make_fleet
from tests.bench.place import MIB, Place

SETTLE_SECONDS = 45.0
"""By then what is to become an event has become one."""

STEADY_SECONDS_MAX = 300.0
_TICKS = os.sysconf("SC_CLK_TCK")


def measure(where: Place) -> list[Row]:
    """CPU and memory with 200 protected machines; the answers to 1,000 agents' reports."""
    small, large = (20, 50) if where.quick else (200, 1000)
    seconds = REPORT_SECONDS_DEFAULT if where.quick else 4 * REPORT_SECONDS_DEFAULT
    share, peak_bytes, _ = _run(where.folder / "idle", small, seconds)
    where.rest()
    large_share, _, answers = _run(where.folder / "many", large, seconds)
    return [
        Row(
            figure=f"config server: CPU with {small:,} protected machines",
            unit="% of a core",
            target=AtMost(10),
            measured=100 * share,
        ),
        Row(
            figure=f"config server: peak resident with {small:,} protected machines",
            unit="MiB",
            target=AtMost(300),
            measured=peak_bytes / MIB,
        ),
        Row(
            figure=f"config server: p99 of the answers to {large:,} agents' reports",
            unit="ms",
            target=AtMost(200),
            measured=1000 * percentile(answers, 0.99),
            note=f"{len(answers):,} answers, median {shown(1000 * percentile(answers, 0.5))} ms, "
            f"longest {shown(1000 * max(answers))} ms; {100 * large_share:.0f} % of a core",
        ),
    ]


def _run(folder: Path, count: int, seconds: float) -> tuple[float, float, list[float]]:
    """Share of a core and peak memory of the daemon, and the seconds that each report took."""
    folder.mkdir()
    settle = min(SETTLE_SECONDS, seconds)
    daemon = Daemon.configured(folder / "server")
    (folder / "fleet").mkdir()
    asyncio.run(make_fleet(daemon.config, folder / "fleet", count))
    with daemon.running():
        assert daemon.process is not None
        pid = daemon.process.pid
        agents = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.bench.fleet"),
                *(str(folder / "fleet"), str(daemon.port), str(count), str(settle), str(seconds)),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert agents.stdout is not None
            assert agents.stdout.readline() == "steady\n"
            began, cpu = time.monotonic(), _cpu_seconds(pid)
            told = json.loads(agents.stdout.readline())
            share = (_cpu_seconds(pid) - cpu) / (time.monotonic() - began)
            assert agents.wait(STEADY_SECONDS_MAX) == 0
        finally:
            agents.kill()
            agents.wait()
        assert told["refused"] == 0, f"{told['refused']} requests were refused"
        peak = _peak_bytes(pid)
    return share, peak, told["seconds"]


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _peak_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

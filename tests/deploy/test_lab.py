"""The lab, as a person runs it: up, proved, down without a trace."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path

import pytest

from deploy.lab.layout import Layout, Ports
from tests.deploy.acknowledged import AcknowledgedWriter
from tests.deploy.small_site import free_hundred

LAB_SECONDS_MAX = 600


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[list[str]]:
    """The command of a lab of one's own; taken down whatever happens."""
    folder = tmp_path / "lab"
    base = free_hundred()
    command = [sys.executable, "-m", "deploy.lab", "--folder", str(folder)]
    command += ["--port-base", str(base)]
    try:
        yield command
    finally:
        subprocess.run([*command, "down"], check=False, timeout=120)


def _run(
    *command: str, seconds_max: float = 60, environ: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=seconds_max, check=False, env=environ
    )


def _operator(folder: Path, understudy: list[str]) -> Callable[..., str]:
    """Runs commands with the sign-in that the lab has written; each must succeed."""
    script = f"set -a; source {folder}/operator.env; env -0"
    told = _run("bash", "-c", script).stdout.split("\0")
    environ = dict(line.split("=", 1) for line in told if "=" in line)

    def run(*arguments: str) -> str:
        done = _run(*understudy, *arguments, seconds_max=300, environ=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def _operate(folder: Path, run: Callable[..., str]) -> None:
    """What an operator does next."""
    machines = {row["name"]: row for row in json.loads(run("machines", "--json"))}
    assert {row["state"] for row in machines.values()} == {"protected"}
    assert all(row["is_virtual"] for row in machines.values())
    old_points = json.loads(run("points", "web-01", "--store", f"{folder}/store", "--json"))
    run("unprotect", "web-01", "--keep-points", "--wait")
    assert "unprotected" in run("machines")
    run("protect", "web-01", "--policy", "lab", "--wait")
    points = json.loads(run("points", "web-01", "--store", f"{folder}/store", "--json"))
    assert {row["point"] for row in points} > {row["point"] for row in old_points}
    assert points[-1]["changeset"].startswith("2.")


def _fail_over(folder: Path, port_base: int, run: Callable[..., str]) -> None:
    """A planned failover under load loses no acknowledged transaction; it is taken back. An
    unplanned one is committed.
    """
    layout = Layout(str(folder), Ports(port_base))
    guest = next(guest for guest in layout.guests() if guest.config.name == "db-01")
    text = (resources.files("deploy.lab") / "opens_database.sh").read_text()
    ask = "SELECT 'acknowledged ' || max(n) || ' of ' || count(*) FROM acknowledged"
    query = f'"$programs/psql" -XAtq -h /tmp/socket -U postgres -c "{ask}"\n'
    script = folder / "check.sh"
    script.write_text(text.replace("kill -INT $server", f"{query}kill -INT $server"))
    assert guest.socket_folder is not None
    with AcknowledgedWriter(guest.socket_folder) as writer:
        run("failover", "planned", "db-01", "--script", str(script), "--yes", "--wait")
    assert writer.last > 100
    shown = json.loads(run("failover", "list", "--json"))
    (moved,) = [row for row in shown if row["machine"] == "db-01"]
    assert moved["state"] == "up"
    found = re.search(r"acknowledged (\d+) of (\d+)", moved["vm"]["check"]["output"])
    assert found is not None, moved
    # One more may have been written whose answer was cut off with the power.
    assert writer.last <= int(found[1]) <= writer.last + 1
    assert found[1] == found[2]
    assert not guest.status().is_powered_on
    run("failover", "cancel", "db-01", "--yes", "--wait")

    run("failover", "unplanned", "files-01", "--yes", "--wait")
    run("failover", "commit", "files-01", "--yes", "--wait")
    states = {row["name"]: row["state"] for row in json.loads(run("machines", "--json"))}
    assert states["files-01"] == "committed"
    assert states["db-01"] in ("protected", "resync-required", "resynchronising")


@pytest.mark.timeout(LAB_SECONDS_MAX + 300)
def test_lab_proves_itself_and_leaves_no_trace(lab: list[str], tmp_path: Path) -> None:
    done = _run(*lab, "up", "--load-seconds", "15", seconds_max=LAB_SECONDS_MAX)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("newest point = source in every block") == 4
    assert done.stdout.count("is clean at") >= 4
    assert "PostgreSQL starts from" in done.stdout
    assert "has all that its service had written" in done.stdout
    assert "balances agree" in done.stdout
    assert re.search(r"boot-01 from \S+: it asks for a login", done.stdout)
    assert "cleaned up, nothing is left of it" in done.stdout

    status = json.loads(_run(*lab, "status", "--json").stdout)
    assert all(part["pid"] for part in status["parts"])
    store = str(tmp_path / "lab" / "store")
    understudy = [sys.executable, "-m", "appliance.cli"]
    machines = json.loads(_run(*understudy, "machines", "--store", store, "--json").stdout)
    assert {machine["name"] for machine in machines} == {"web-01", "db-01", "files-01", "boot-01"}
    points = json.loads(_run(*understudy, "points", "db-01", "--store", store, "--json").stdout)
    assert points[-1]["consistency"] == "crash"
    verified = _run(*understudy, "verify", "web-01", "--store", store)
    assert verified.returncode == 0, verified.stderr
    image = tmp_path / "web.img"
    exported = _run(*understudy, "export", "web-01", "--store", store, "--output", str(image))
    assert exported.returncode == 0, exported.stderr
    assert image.stat().st_size == 2 << 30
    assert image.stat().st_blocks * 512 < 1 << 30  # holes are holes again

    run = _operator(tmp_path / "lab", understudy)
    _operate(tmp_path / "lab", run)
    _fail_over(tmp_path / "lab", int(lab[-1]), run)
    down = _run(*lab, "down", seconds_max=120)
    assert down.returncode == 0, down.stderr
    folder = str(tmp_path / "lab")
    assert not os.path.exists(folder)
    loops = _run("losetup", "-l", "-n", "-O", "BACK-FILE").stdout
    assert folder not in loops
    assert folder not in Path("/proc/self/mountinfo").read_text()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if f"{folder}/config".encode() in command]

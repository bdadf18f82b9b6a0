"""The lab, as a person runs it: up, proved, down without a trace."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.azure_emu.fixtures import free_ports

LAB_SECONDS_MAX = 600


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[list[str]]:
    """The command of a lab of one's own; taken down whatever happens."""
    folder = tmp_path / "lab"
    base = free_ports(1)[0] // 100 * 100
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


def _operate(folder: Path, understudy: list[str]) -> None:
    """What an operator does next, with the sign-in that the lab has written."""
    script = f"set -a; source {folder}/operator.env; env -0"
    told = _run("bash", "-c", script).stdout.split("\0")
    environ = dict(line.split("=", 1) for line in told if "=" in line)

    def run(*arguments: str) -> str:
        done = _run(*understudy, *arguments, seconds_max=180, environ=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

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


@pytest.mark.timeout(LAB_SECONDS_MAX + 120)
def test_lab_proves_itself_and_leaves_no_trace(lab: list[str], tmp_path: Path) -> None:
    done = _run(*lab, "up", "--load-seconds", "15", seconds_max=LAB_SECONDS_MAX)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("newest point = source in every block") == 4
    assert done.stdout.count("is clean at") >= 4
    assert "PostgreSQL starts from" in done.stdout
    assert "has all that its service had written" in done.stdout

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

    _operate(tmp_path / "lab", understudy)
    down = _run(*lab, "down", seconds_max=120)
    assert down.returncode == 0, down.stderr
    folder = str(tmp_path / "lab")
    assert not os.path.exists(folder)
    loops = _run("losetup", "-l", "-n", "-O", "BACK-FILE").stdout
    assert folder not in loops
    assert folder not in Path("/proc/self/mountinfo").read_text()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if f"{folder}/config".encode() in command]

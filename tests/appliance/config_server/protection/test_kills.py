"""A config server killed between any two durable writes of a job ends it as if nothing had been."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.config_server.protection.jobs import JobKind
from tests.appliance.config_server.postgresql import USER, PostgreSQL

ROOT = Path(__file__).parents[4]
ENDS = {
    JobKind.PROTECT: ["initial-replication", "kept", 0, None],
    JobKind.UNPROTECT: ["unprotected", "", 0, None],
    JobKind.ADD_DISK: ["protected", "kept", 0, None],
    JobKind.EXCLUDE_DISK: ["protected", "kept", 0, None],
    JobKind.RESYNC: ["resync-required", "kept", 1, None],
}
STEP_BOUNDARIES = 3
END_BOUNDARIES = 4


def kill_everywhere(
    folder: Path, *arguments: str, play: str = "tests.appliance.config_server.protection.killing"
) -> dict[str, list[dict[str, Any]]]:
    """What came of each kind of job: undisturbed, then killed at each boundary."""
    told = subprocess.run(
        [
            sys.executable,
            "-m",
            play,
            str(folder),
            *arguments,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        timeout=280,
    ).stdout.decode()
    found: dict[str, list[dict[str, Any]]] = {}
    for line in told.splitlines():
        row = json.loads(line)
        found.setdefault(row["kind"], []).append(row)
    return found


def check(rows: list[dict[str, Any]], kind: JobKind) -> None:
    rows = sorted(rows, key=lambda row: int(row["kill_at"]))
    whole = rows[0]
    assert (whole["state"], whole["error"]) == ("succeeded", None)
    assert whole["machine"] == ENDS[kind]
    boundaries = whole.pop("boundaries")
    assert len(boundaries) == STEP_BOUNDARIES * len(whole["steps"]) + END_BOUNDARIES
    assert len(rows) == 1 + len(boundaries)
    for row, boundary in zip(rows[1:], boundaries, strict=True):
        assert row["killed"], boundary
        told = {**row, "kill_at": 0, "killed": False}
        assert told == whole, f"{kind} killed at {boundary!r}"


def test_every_job_ends_the_same_wherever_it_is_killed(tmp_path: Path) -> None:
    found = kill_everywhere(tmp_path)
    assert set(found) == set(ENDS)
    for kind, rows in found.items():
        check(rows, JobKind(kind))


@pytest.mark.parametrize("kind", [JobKind.UNPROTECT])
def test_the_same_holds_on_postgresql(
    tmp_path: Path, postgresql: PostgreSQL, kind: JobKind
) -> None:
    server = f"postgresql+psycopg://{USER}@/{{}}?host={postgresql.folder}"
    found = kill_everywhere(tmp_path, "--server", server, "--kind", kind)
    check(found[kind], kind)

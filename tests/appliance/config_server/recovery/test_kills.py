"""A config server killed between any two durable writes of a job of recovery ends it as if nothing
had been: one VM, one hold, one order.
"""

from pathlib import Path
from typing import Any

import pytest

from appliance.config_server.protection.jobs import JobKind
from tests.appliance.config_server.postgresql import USER, PostgreSQL
from tests.appliance.config_server.protection.test_kills import kill_everywhere
from tests.appliance.config_server.recovery.killing import KINDS, worth

PLAY = "tests.appliance.config_server.recovery.killing"
ENDS = {
    JobKind.FAILOVER: (["failed-over", "kept"], [["latest", False]]),
    JobKind.CLEANUP: (["protected", "kept"], [["latest", True]]),
    JobKind.COMMIT: (["committed", "removing"], [["latest", True]]),
    JobKind.CANCEL_FAILOVER: (["protected", "kept"], [["latest", True]]),
    JobKind.CHANGE_POINT: (["failed-over", "kept"], [["latest", True], ["old", False]]),
}


def check(rows: list[dict[str, Any]], kind: JobKind) -> None:
    rows = sorted(rows, key=lambda row: int(row["kill_at"]))
    whole = rows[0]
    assert (whole["state"], whole["error"]) == ("succeeded", None)
    machine, holds = ENDS[kind]
    assert (whole["machine"], whole["holds"]) == ([*machine, None, False], holds)
    boundaries = whole.pop("boundaries")
    tried = worth(boundaries)
    assert len(tried) >= 2 * len(whole["steps"]) + 4
    assert [row["kill_at"] for row in rows[1:]] == tried
    for row in rows[1:]:
        boundary = boundaries[row["kill_at"] - 1]
        assert row["killed"], boundary
        told = {**row, "kill_at": 0, "killed": False}
        assert told == whole, f"{kind} killed at {boundary!r}"


def test_every_job_ends_the_same_wherever_it_is_killed(tmp_path: Path) -> None:
    found = kill_everywhere(tmp_path, play=PLAY)
    assert set(found) == set(KINDS)
    for kind, rows in found.items():
        check(rows, JobKind(kind))


@pytest.mark.parametrize("kind", [JobKind.CANCEL_FAILOVER])
def test_the_same_holds_on_postgresql(
    tmp_path: Path, postgresql: PostgreSQL, kind: JobKind
) -> None:
    server = f"postgresql+psycopg://{USER}@/{{}}?host={postgresql.folder}"
    found = kill_everywhere(tmp_path, "--server", server, "--kind", kind, play=PLAY)
    check(found[kind], kind)

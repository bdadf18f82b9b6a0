"""The lab's last chapter: all guests started at the second site, by a recovery plan, as a test.

A test failover runs beside replication and leaves nothing behind; what it has shown stays in the
config server: checks, measured RTO, consoles, screenshots.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from appliance.cli.api_client import ApiClient
from deploy.lab.layout import Layout
from deploy.lab.stack import Stack, wait_for
from replication.errors import IntegrityError, NotFoundError, ReplicationError, UnavailableError

PLAN = "lab"
RUN_SECONDS_MAX = 300.0
CLEAN_UP_SECONDS_MAX = 60.0
TICK_SECONDS = 0.25
CHECK_SECONDS_MAX = 240
_ENDED = ("succeeded", "failed", "cancelled")
_MEBIBYTE = 1 << 20

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Started:
    """A machine of the test as it was when it was up."""

    machine: str
    point: str
    consistency: str
    guest: str
    detail: str
    file_systems: tuple[str, ...]
    rto_seconds: float
    disks_seconds: float


@dataclass(frozen=True, slots=True)
class Rehearsed:
    """What the test has shown. ``rpo_seconds_max``: the worst RPO of any machine meanwhile."""

    started: tuple[Started, ...]
    seconds: float
    rpo_seconds_max: float


class Rehearsal:
    """One run of the plan, told step by step."""

    def __init__(self, stack: Stack, say: Say) -> None:
        self._stack = stack
        self._say = say

    def run(self, machines: Sequence[str]) -> Rehearsed:
        """Make the plan, run it as a test, look at what came of it, and clean up.

        Raises ReplicationError with the reason of the first thing that does not hold.
        """
        with ApiClient(self._stack.operator.sign_in()) as api:
            self._make_plan(api, machines)
            began = time.monotonic()
            job = api.post(f"/plans/{PLAN}/runs", {"kind": "test", "notes": "the lab's rehearsal"})
            worst = self._follow(api, job["id"])
            seconds = time.monotonic() - began
            run = next(
                each for each in api.items(f"/plans/{PLAN}/runs") if each["job"] == job["id"]
            )
            failovers = api.get(f"/runs/{run['id']}")["failovers"]
            started = [_started(api.get(f"/failovers/{one['id']}")) for one in failovers]
            self._keep_evidence(api, failovers)
            cleaning = api.post(f"/runs/{run['id']}/cleanup", {"notes": "all machines came up"})
            wait_for(
                "the clean-up of the test failover",
                functools.partial(self._has_succeeded, api, cleaning["id"]),
                CLEAN_UP_SECONDS_MAX,
            )
        return Rehearsed(tuple(started), seconds, worst)

    def _make_plan(self, api: ApiClient, machines: Sequence[str]) -> None:
        document = plan_of(machines)
        try:
            api.get(f"/plans/{PLAN}")
        except NotFoundError:
            api.post("/plans", document)
        else:
            api.put(f"/plans/{PLAN}", {"plan": document})

    def _follow(self, api: ApiClient, job_id: str) -> float:
        """Tell each step as it ends, and watch the RPO meanwhile: replication goes on."""
        deadline = time.monotonic() + RUN_SECONDS_MAX
        told: set[str] = set()
        worst = 0.0
        while True:
            job = api.get(f"/jobs/{job_id}")
            for step in job["steps"]:
                if step["state"] == "done" and step["name"] not in told:
                    told.add(step["name"])
                    took = (step["ended_ns"] - step["started_ns"]) / 1e9
                    note = f": {step['note']}" if step["note"] else ""
                    self._say(f"{step['name']}{note} ({took:.1f} s)")
            if job["state"] == "succeeded":
                return worst
            if job["state"] in _ENDED:
                raise ReplicationError(
                    f"the test failover has {job['state']}: {(job['error'] or {}).get('message')}",
                    hint=f"understudy jobs {job_id}; logs in {self._stack.layout.path('log')}",
                )
            if time.monotonic() > deadline:
                raise UnavailableError(f"the test failover takes over {RUN_SECONDS_MAX:.0f} s")
            self._stack.check_alive()
            worst = max(worst, *(self._rpo_seconds(guest) for guest in self._stack.layout.guests()))
            time.sleep(TICK_SECONDS)

    def _rpo_seconds(self, guest: Any) -> float:
        news = self._stack.news(guest.config.name)
        return 0.0 if news is None else (time.time_ns() - news.durable_ns) / 1e9

    def _has_succeeded(self, api: ApiClient, job_id: str) -> bool:
        job = api.get(f"/jobs/{job_id}")
        if job["state"] in ("failed", "cancelled"):
            raise ReplicationError(f"the clean-up has {job['state']}: {job['error']}")
        return bool(job["state"] == "succeeded")

    def _keep_evidence(self, api: ApiClient, failovers: Sequence[Mapping[str, Any]]) -> None:
        """Screenshots for people to look at, in the lab's folder."""
        for one in failovers:
            if api.get(f"/failovers/{one['id']}")["has_screenshot"]:
                path = screenshot_path(self._stack.layout, one["machine"])
                with open(path, "wb") as file:
                    file.write(api.get_bytes(f"/failovers/{one['id']}/screenshot"))


def screenshot_path(layout: Layout, machine: str) -> str:
    return os.path.join(layout.root, f"{machine}.png")


def plan_of(machines: Sequence[str]) -> dict[str, Any]:
    """The database first, then all others side by side."""
    script = (resources.files("deploy.lab") / "opens_database.sh").read_text()
    database = [name for name in machines if name.startswith("db-")]
    others = [name for name in machines if name not in database]
    return {
        "name": PLAN,
        "description": "The database first; when it has answered, what stands on it.",
        "groups": [
            {
                "name": "database",
                "machines": [
                    {"machine": name, "script": script, "check_seconds_max": CHECK_SECONDS_MAX}
                    for name in database
                ],
            },
            {
                "name": "everything else",
                "machines": [
                    {"machine": name, "check_seconds_max": CHECK_SECONDS_MAX} for name in others
                ],
            },
        ],
    }


def _started(failover: Mapping[str, Any]) -> Started:
    """Raises IntegrityError for one whose check was not passed."""
    vm = failover["vm"] or {}
    check = vm.get("check") or {}
    if failover["state"] != "up" or not check.get("passed"):
        raise IntegrityError(
            f"{failover['machine']} has not come up from {failover['point']}: "
            f"{failover['error'] or check.get('detail') or vm.get('reason')}",
            hint=f"understudy vms console {failover['machine']}",
        )
    return Started(
        machine=failover["machine"],
        point=failover["point"],
        consistency=failover["consistency"],
        guest=vm["guest"],
        detail=check.get("output")
        or ("" if check.get("file_systems") else check.get("detail", "")),
        file_systems=tuple(
            f"{one['kind']} {'clean' if one['clean'] else 'not clean'}, "
            f"{one['used_bytes'] / _MEBIBYTE:,.0f} MiB used"
            for one in check.get("file_systems", ())
        ),
        rto_seconds=failover["rto_seconds"],
        disks_seconds=vm["disks_seconds"],
    )

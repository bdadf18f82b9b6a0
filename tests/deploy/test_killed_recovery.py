"""Any part of the second site may die while machines are failed over, and nothing is done twice."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from appliance.cli.api_client import ApiClient
from azure_emu.compute.launch import mark_of
from azure_emu.compute.process import find_processes
from deploy.lab.process import Background
from replication.errors import ReplicationError
from tests.deploy.small_site import SmallSite, ended, plan_of, restart, small_site

NAMES = ("first", "second")
CALM_SECONDS = (1.0, 5.0)
SITE_SECONDS_MAX = 900


@pytest.fixture
def site(tmp_path: Path) -> Iterator[SmallSite]:
    with small_site(tmp_path, NAMES, busy=True) as up:
        yield up


class Killing:
    """Kills config server, compute node and applier in turn while it is open.

    count: of kills so far.
    """

    def __init__(self, site: SmallSite, seed: int) -> None:
        self.count = 0
        self._parts = [site.stack.config_server, site.stack.compute, site.stack.applier]
        self._random = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._errors: list[ReplicationError] = []

    def _run(self) -> None:
        while not self._stop.wait(self._random.uniform(*CALM_SECONDS)):
            part = self._random.choice(self._parts)
            try:
                self._kill(part)
            except ReplicationError as error:
                self._errors.append(error)
                return

    def _kill(self, part: Background) -> None:
        restart(part)
        self.count += 1
        part.wait_ready()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()
        assert not self._errors, self._errors


def do(site: SmallSite, api: ApiClient, seed: int, path: str, body: dict[str, Any]) -> int:
    """Ask for a job and kill whatever there is until it has ended; returns how often."""
    job = api.post(path, body)
    with Killing(site, seed) as killing:
        ended(api, job["id"])
    return killing.count


def open_failover(api: ApiClient, machine: str) -> dict[str, Any]:
    """The only one that a machine has open."""
    (found,) = api.items("/failovers", {"machine": machine, "open": True})
    return dict(found)


def is_up_once(site: SmallSite, api: ApiClient, machine: str) -> dict[str, Any]:
    """Its failover, of which exactly one process runs, and whose check has been passed."""
    found = open_failover(api, machine)
    assert found["state"] == "up", found
    assert found["vm"]["check"]["passed"], found
    assert len(processes_of(site, found["vm"]["id"])) == 1
    return found


def processes_of(site: SmallSite, vm: str) -> list[int]:
    return find_processes(mark_of(site.layout.path("compute", "vms", vm)))


def nothing_is_left(site: SmallSite, *failovers: dict[str, Any]) -> None:
    """Neither a VM's process nor a folder of one."""
    assert not [one for one in failovers if processes_of(site, one["vm"]["id"])]
    assert list(Path(site.layout.path("compute", "vms")).glob("*")) == []


def rounds(site: SmallSite, seed: int) -> int:
    """A test failover by a plan, an unplanned and a planned failover, each with kills."""
    kills = 0
    with site.operator() as api:
        plan = f"both-{seed}"
        api.post("/plans", plan_of(plan, NAMES))
        kills += do(site, api, seed, f"/plans/{plan}/runs", {"kind": "test"})
        (run,) = api.items(f"/plans/{plan}/runs")
        tests = [is_up_once(site, api, name) for name in NAMES]
        assert {one["run"] for one in tests} == {run["id"]}
        kills += do(site, api, seed + 1, f"/runs/{run['id']}/cleanup", {"notes": plan})
        nothing_is_left(site, *tests)

        for kind, name in (("unplanned", "first"), ("planned", "second")):
            kills += do(site, api, seed + 2, f"/machines/{name}/failovers", {"kind": kind})
            moved = is_up_once(site, api, name)
            if kind == "planned":
                assert moved["rpo_seconds"] == 0
            kills += do(site, api, seed + 3, f"/failovers/{moved['id']}/cancel", {})
            nothing_is_left(site, moved)
        assert not api.items("/failovers", {"open": True})
    return kills


@pytest.mark.timeout(SITE_SECONDS_MAX)
def test_failovers_end_once_whatever_dies(site: SmallSite) -> None:
    assert rounds(site, 1) >= 8


@pytest.mark.soak
@pytest.mark.timeout(4 * SITE_SECONDS_MAX)
def test_many_failovers_end_once_whatever_dies(site: SmallSite) -> None:
    assert sum(rounds(site, seed) for seed in range(10, 80, 10)) >= 60

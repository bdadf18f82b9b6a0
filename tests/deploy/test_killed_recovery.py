"""Any part of the second site may die while machines are failed over, and nothing is done twice."""

import json
import random
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from azure.storage.blob import BlobServiceClient

from appliance.applier.cache_account import API_VERSION_DEFAULT
from appliance.cli.api_client import ApiClient
from azure_emu.compute.launch import mark_of
from azure_emu.compute.process import find_processes
from deploy.lab.process import Background
from deploy.lab.stack import wait_for
from replication.cache_layout import (
    blob_number,
    container_last,
    machine_prefix,
    manifest_number,
)
from replication.errors import ReplicationError
from tests.deploy.small_site import SmallSite, ended, plan_of, restart, small_site

NAMES = ("first", "second")
CALM_SECONDS = (1.0, 5.0)
SITE_SECONDS_MAX = 900


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallSite]:
    with small_site(tmp_path_factory.mktemp("killed"), NAMES, busy=True) as up:
        yield up


class Cache:
    """The changesets of a machine in the cache storage account, which no applier takes now."""

    def __init__(self, service: BlobServiceClient, machine: uuid.UUID) -> None:
        self._service = service
        self._prefix = machine_prefix(machine)

    def newest(self) -> int:
        """The number of the newest changeset that has a manifest; 0: none has."""
        return max((manifest_number(name) or 0 for _, name in self._blobs()), default=0)

    def lose(self, number: int, what: str) -> None:
        """Delete a changeset's manifest, or one of its segments."""
        container, name = next(
            (container, name)
            for container, name in self._blobs()
            if blob_number(name) == number and name.startswith(f"{what}/")
        )
        self._service.get_blob_client(container, name).delete_blob()

    def _blobs(self) -> Iterator[tuple[str, str]]:
        for container in self._service.list_containers(name_starts_with=self._prefix):
            if container_last(container.name) is not None:
                client = self._service.get_container_client(container.name)
                yield from ((container.name, blob.name) for blob in client.list_blobs())


@pytest.fixture
def cache(site: SmallSite) -> Iterator[Cache]:
    connection = Path(site.layout.path("keys", "cache.connection")).read_text().strip()
    with BlobServiceClient.from_connection_string(
        connection, api_version=API_VERSION_DEFAULT
    ) as service:
        yield Cache(service, site.layout.machine_id("first"))


def applied(site: SmallSite, machine: str) -> int:
    """The number of the newest changeset that its agent knows to be applied."""
    news = site.stack.news(machine)
    return int(news.applied.rpartition(".")[2]) if news and news.applied else 0


def stop(part: Background) -> None:
    part.kill()
    wait_for(f"the end of {part.name}", lambda: part.pid() is None, 10.0, 0.02)


@pytest.mark.timeout(SITE_SECONDS_MAX)
@pytest.mark.parametrize("lost", ["manifest", "segment"])
def test_what_is_not_whole_gives_way_to_the_last_that_is_and_that_is_told(
    site: SmallSite, cache: Cache, lost: str
) -> None:
    stack = site.stack
    stop(stack.applier)
    before = applied(site, "first")
    number = before + 2
    # The one after it comes seconds later: all have been told of it by then.
    wait_for("some more changesets in the cache", lambda: cache.newest() > number, 90.0)
    stop(stack.process_server)  # which would put again what is missing
    cache.lose(number, lost)
    stack.applier.start()
    stack.applier.wait_ready()
    with site.operator() as api:
        asked = {"kind": "unplanned", "wait_seconds": 5, "shut_down": False}
        job = ended(api, api.post("/machines/first/failovers", asked)["id"])
        notes = {step["name"]: step["note"] for step in job["steps"]}
        assert "first: the newest processed point" in notes["hold the points"]
        moved = is_up_once(site, api, "first")
        told = Path(site.layout.path("points", "first", moved["point"], "point.json")).read_text()
        taken = int(json.loads(told)["stamp"].rpartition(".")[2])
        assert before <= taken < number
        ended(api, api.post(f"/failovers/{moved['id']}/cancel", {})["id"])
    stack.process_server.start()
    stack.process_server.wait_ready()
    wait_for("what was lost, put again", lambda: applied(site, "first") >= number, 90.0)


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
            site.switch_on(name)
        assert not api.items("/failovers", {"open": True})
    return kills


@pytest.mark.timeout(SITE_SECONDS_MAX)
def test_failovers_end_once_whatever_dies(site: SmallSite) -> None:
    assert rounds(site, 1) >= 8


@pytest.mark.soak
@pytest.mark.timeout(4 * SITE_SECONDS_MAX)
def test_many_failovers_end_once_whatever_dies(site: SmallSite) -> None:
    assert sum(rounds(site, seed) for seed in range(10, 100, 10)) >= 60

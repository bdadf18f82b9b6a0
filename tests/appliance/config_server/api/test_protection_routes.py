"""Policies, machines and jobs over the API, with nodes that speak it too."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.config_server.store.schema import Node, VCenter, VirtualMachine
from replication.control.report import Phase
from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.api.fleet import Fleet, open_fleet
from tests.appliance.config_server.running import Rig, open_rig

WAIT_SECONDS = 30.0


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, jobs={"answer_seconds_max": 20, "sweep_seconds": 0.5}) as opened:
        yield opened


@pytest.fixture
async def fleet(rig: Rig) -> AsyncIterator[Fleet]:
    async with open_fleet(rig) as opened:
        yield opened


@pytest.fixture
async def boss(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with rig.operator(OperatorRole.CONTRIBUTOR) as client:
        yield client


async def gold(boss: httpx.AsyncClient, **settings: Any) -> dict[str, Any]:
    answer = await boss.post("policies", json={"name": "gold", **settings})
    assert answer.status_code == httpx.codes.CREATED, answer.text
    return dict(answer.json())


async def ended(boss: httpx.AsyncClient, answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == httpx.codes.ACCEPTED, answer.text
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            job: dict[str, Any] = (await boss.get(f"jobs/{answer.json()['id']}")).json()
            if job["ended_ns"] is not None:
                return job
            await asyncio.sleep(0.05)


async def machine(boss: httpx.AsyncClient, state: str) -> dict[str, Any]:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            found: dict[str, Any] = (await boss.get("machines/web-1")).json()
            if found["state"] == state:
                return found
            await asyncio.sleep(0.05)


async def test_a_policy_comes_with_its_failback_policy(boss: httpx.AsyncClient) -> None:
    made = await gold(boss, retention_seconds=3 * 86400)
    assert made["rpo_threshold_seconds"] == 900
    assert made["resync_window"] == "22:00-06:00"
    listed = (await boss.get("policies")).json()["items"]
    assert [(row["name"], row["kind"]) for row in listed] == [
        ("gold", "replication"),
        ("gold-failback", "failback"),
    ]
    assert {row["retention_seconds"] for row in listed} == {3 * 86400}

    changed = await boss.patch("policies/gold", json={"name": "silver", "retention_seconds": 7200})
    assert changed.json()["retention_seconds"] == 7200
    names = [row["name"] for row in (await boss.get("policies")).json()["items"]]
    assert names == ["silver", "silver-failback"]
    assert (await boss.delete("policies/silver")).status_code == httpx.codes.NO_CONTENT
    assert (await boss.get("policies")).json()["items"] == []


async def test_policies_that_make_no_sense_are_refused_with_the_reason(
    boss: httpx.AsyncClient,
) -> None:
    await gold(boss)
    for method, path, body, status, told in (
        ("POST", "policies", {"name": "x", "retention_seconds": 99 * 86400}, 422, "15 d"),
        ("POST", "policies", {"name": "x", "crash_frequency_seconds": 60}, 422, "fixed at 300"),
        ("POST", "policies", {"name": "gold"}, 409, "already"),
        ("POST", "policies", {"name": "x-failback"}, 422, "failback"),
        ("PATCH", "policies/gold", {"app_frequency_seconds": 60}, 422, "app_frequency"),
        ("PATCH", "policies/gold", {"revision": 7}, 409, "changed meanwhile"),
        ("PATCH", "policies/gold-failback", {"retention_seconds": 7200}, 422, "follows"),
        ("DELETE", "policies/gold-failback", None, 422, "follows"),
        ("DELETE", "policies/none", None, 404, "no policy none"),
    ):
        answer = await boss.request(method, path, json=body)
        assert answer.status_code == status, answer.text
        assert told in answer.json()["message"], answer.text


async def test_a_machine_is_protected_watched_and_unprotected(
    boss: httpx.AsyncClient, fleet: Fleet
) -> None:
    await gold(boss)
    before = (await boss.get("machines", params={"unprotected": True})).json()["items"]
    assert [(row["name"], row["state"]) for row in before] == [("web-1", "unprotected")]
    assert [disk["device"] for disk in before[0]["disks"]] == ["/dev/sda", "/dev/sdb"]

    job = await ended(boss, await boss.post("machines/web-1/protect", json={"policy": "gold"}))
    assert (job["state"], job["error"], job["kind"]) == ("succeeded", None, "protect")
    assert all(step["state"] == "done" and step["ended_ns"] for step in job["steps"])
    found = await machine(boss, "protected")
    assert (found["policy"], found["process_server"], found["applier"]) == (
        "gold",
        "ps-1",
        "applier-1",
    )
    assert [disk["protected"] for disk in found["disks"]] == [True, True]
    told = fleet.assignments["web-1"]
    assert told["process_server"] == "https://ps-1:9443"
    assert [disk["device"] for disk in told["disks"]] == ["wwn-0", "wwn-1"]
    assert str(fleet.peers["web-1"].node) in fleet.assignments["ps-1"]["machines"]
    assert (await boss.get("machines", params={"unprotected": True})).json()["items"] == []

    for method, path, body in (
        ("DELETE", "policies/gold", None),
        ("POST", "machines/web-1/protect", {"policy": "gold"}),
    ):
        answer = await boss.request(method, path, json=body)
        assert answer.status_code == httpx.codes.CONFLICT
        assert "web-1" in answer.json()["message"]
    await boss.patch("policies/gold", json={"retention_seconds": 7200})
    async with asyncio.timeout(WAIT_SECONDS):
        while fleet.assignments["applier-1"]["machines"][0]["retention_seconds"] != 7200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    job = await ended(boss, await boss.delete("machines/web-1/disks/1"))
    assert job["state"] == "succeeded"
    assert [disk["device"] for disk in fleet.assignments["web-1"]["disks"]] == ["wwn-0"]
    job = await ended(boss, await boss.post("machines/web-1/disks", json={"device": "/dev/sdb"}))
    assert job["state"] == "succeeded"
    job = await ended(boss, await boss.post("machines/web-1/resync", json={"now": True}))
    assert job["state"] == "succeeded"
    await machine(boss, "protected")

    answer = await boss.post("machines/web-1/unprotect", json={"keep_points": False})
    assert (await ended(boss, answer))["state"] == "succeeded"
    found = await machine(boss, "unprotected")
    assert (found["policy"], found["points"], found["job"]) == (None, "", None)
    kinds = [row["kind"] for row in (await boss.get("jobs")).json()["items"]]
    assert kinds == ["unprotect", "resync", "add-disk", "exclude-disk", "protect"]
    actions = [row["action"] for row in (await boss.get("audit")).json()["items"]]
    assert "machine.protect" in actions


async def test_a_failed_job_says_why_and_a_cancelled_one_is_undone(
    boss: httpx.AsyncClient, fleet: Fleet
) -> None:
    await gold(boss)
    fleet.stuck["web-1"] = Phase.FAILED
    job = await ended(boss, await boss.post("machines/web-1/protect", json={"policy": "gold"}))
    assert job["state"] == "failed"
    assert job["error"]["code"] == "agent_failed"
    assert "as the test says" in job["error"]["message"]
    async with asyncio.timeout(WAIT_SECONDS):
        while (await boss.get("machines/web-1")).json()["points"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)

    fleet.stuck["web-1"] = Phase.IDLE
    answer = await boss.post("machines/web-1/protect", json={"policy": "gold"})
    busy = await boss.post("machines/web-1/protect", json={"policy": "gold"})
    assert (busy.status_code, busy.json()["code"]) == (409, "busy")
    assert answer.json()["id"] in busy.json()["message"]
    cancelled = await boss.post(f"jobs/{answer.json()['id']}/cancel")
    assert cancelled.json()["cancel_asked"]
    assert (await ended(boss, answer))["state"] == "cancelled"
    assert (await machine(boss, "unprotected"))["policy"] is None
    again = await boss.post(f"jobs/{answer.json()['id']}/cancel")
    assert again.status_code == httpx.codes.CONFLICT


async def test_what_cannot_be_protected_is_refused_with_the_way_out(
    boss: httpx.AsyncClient, fleet: Fleet, rig: Rig
) -> None:
    await gold(boss)
    async with rig.server.database.writing() as session:
        center = VCenter(
            id=uuid.uuid4(), name="vc", url="", username="", password=b"", ca_pem="",
            added_ns=1, state="connected",
        )  # fmt: skip
        session.add(center)
        await session.flush()
        for name, bios in (("lonely", uuid.UUID(int=8)), ("web-vm", uuid.UUID(int=7))):
            session.add(
                VirtualMachine(
                    id=uuid.uuid4(),
                    vcenter_id=center.id,
                    moid=name,
                    name=name,
                    bios_uuid=bios,
                    power="on",
                    addresses=[],
                    disks=[],
                    updated_ns=1,
                )
            )
    await rig.enrol(NodeRole.MACHINE, name="mute")
    job = await ended(boss, await boss.post("machines/web-1/protect", json={"policy": "gold"}))
    assert job["state"] == "succeeded"
    await machine(boss, "protected")
    assert (await boss.get("machines/web-1")).json()["is_virtual"]
    await fleet.join("twin", NodeRole.MACHINE, bios_uuid=uuid.UUID(int=7))
    for name, status, code, told in (
        ("nobody", 404, "not_found", "no machine nobody"),
        ("lonely", 404, "agent_missing", "not enrolled"),
        ("web-vm", 404, "not_found", "called web-1"),
        ("mute", 409, "conflict", "never reported"),
        ("twin", 409, "conflict", "same BIOS UUID"),
        ("web-1", 409, "conflict", "is protected"),
    ):
        answer = await boss.post(f"machines/{name}/protect", json={"policy": "gold"})
        assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
        assert told in answer.json()["message"]
        assert answer.json()["hint"]


async def test_a_refused_request_changes_nothing(boss: httpx.AsyncClient, fleet: Fleet) -> None:
    await gold(boss)
    bodies: tuple[tuple[dict[str, Any], str], ...] = (
        ({"policy": "none"}, "no policy none"),
        ({"policy": "gold-failback"}, "failback policy"),
        ({"policy": "gold", "applier": "x"}, "no applier x"),
        ({"policy": "gold", "process_server": "x"}, "no process server x"),
        ({"policy": "gold", "disks": ["/dev/sdb"]}, "system disk"),
        ({"policy": "gold", "disks": ["/dev/sdz"]}, "no disk /dev/sdz"),
        ({"policy": "gold", "disks": []}, "at least one"),
    )
    for body, told in bodies:
        answer = await boss.post("machines/web-1/protect", json=body)
        assert answer.status_code in (404, 422), answer.text
        assert told in answer.json()["message"]
    assert (await boss.get("machines/web-1")).json()["state"] == "unprotected"
    assert (await boss.get("jobs")).json()["items"] == []


async def test_a_silent_agent_or_appliance_is_given_no_work(
    boss: httpx.AsyncClient, fleet: Fleet, rig: Rig
) -> None:
    await gold(boss)
    for task in fleet.tasks:
        task.cancel()
    await asyncio.gather(*fleet.tasks, return_exceptions=True)
    rig.clock.ahead_ns += 90 * 10**9
    answer = await boss.post("machines/web-1/protect", json={"policy": "gold"})
    assert answer.status_code == httpx.codes.CONFLICT
    assert "the agent of web-1 was last heard of 90 s ago" in answer.json()["message"]
    async with rig.server.database.writing() as session:
        node = await session.get_one(Node, fleet.peers["web-1"].node)
        assert node.assignment_version == 1

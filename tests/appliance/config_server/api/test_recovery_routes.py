"""Failovers, points and evidence over the API, with nodes that speak it too."""

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from replication.control.recovery import EVIDENCE_BYTES_MAX, ListedPoint, PointList
from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.api.fleet import Fleet, open_fleet
from tests.appliance.config_server.api.test_protection_routes import (
    WAIT_SECONDS,
    ended,
    gold,
    machine,
)
from tests.appliance.config_server.running import Rig, open_rig

PNG = b"\x89PNG\r\n\x1a\n" + bytes(100)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, jobs={"answer_seconds_max": 20, "sweep_seconds": 0.5}) as opened:
        yield opened


@pytest.fixture
async def fleet(rig: Rig) -> AsyncIterator[Fleet]:
    """web-1 is protected, and there is a compute node."""
    async with open_fleet(rig) as opened, rig.operator() as boss:
        await opened.join("compute-1", NodeRole.COMPUTE)
        await gold(boss)
        await ended(boss, await boss.post("machines/web-1/protect", json={"policy": "gold"}))
        await machine(boss, "protected")
        yield opened


@pytest.fixture
async def operator(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with rig.operator(OperatorRole.OPERATOR) as client:
        yield client


def evidence(content: bytes) -> dict[str, str]:
    return {"content": base64.b64encode(content).decode()}


async def failed_over(operator: httpx.AsyncClient, kind: str, **more: Any) -> dict[str, Any]:
    answer = await operator.post("machines/web-1/failovers", json={"kind": kind, **more})
    job = await ended(operator, answer)
    assert (job["state"], job["error"]) == ("succeeded", None)
    listed = (await operator.get("failovers", params={"kind": kind, "open": True})).json()
    return dict(listed["items"][0])


async def test_a_test_failover_with_its_evidence_until_it_is_cleaned_up(
    rig: Rig, fleet: Fleet, operator: httpx.AsyncClient
) -> None:
    failover = await failed_over(operator, "test", notes="before the release")
    assert (failover["state"], failover["machine"], failover["plan"]) == ("up", "web-1", "")
    assert failover["vm"]["check"]["detail"] == "all mounted"
    assert failover["rto_seconds"] > 0
    assert failover["rpo_seconds"] is not None
    here, vm = f"failovers/{failover['id']}", failover["vm"]["id"]
    assert (await operator.get(f"{here}/console")).status_code == httpx.codes.NOT_FOUND
    async with rig.node(fleet.peers["compute-1"]) as compute:
        for kind, content, status in (
            ("console", b"login:\xff ", 204),
            ("screenshot", PNG, 204),
            ("screenshot", b"GIF89a", 422),
            ("console", bytes(EVIDENCE_BYTES_MAX + 1), 422),
        ):
            answer = await compute.post(f"node/evidence/{vm}/{kind}", json=evidence(content))
            assert answer.status_code == status, answer.text
        other = await compute.post(f"node/evidence/{uuid.uuid4()}/console", json=evidence(b"x"))
        assert other.status_code == httpx.codes.FORBIDDEN
        bad = await compute.post(f"node/evidence/{vm}/console", json={"content": "%%%"})
        assert bad.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    async with rig.node(await rig.enrol(NodeRole.COMPUTE)) as stranger:
        answer = await stranger.post(f"node/evidence/{vm}/console", json=evidence(b"x"))
        assert answer.status_code == httpx.codes.FORBIDDEN
    job = await ended(operator, await operator.post(f"{here}/cleanup", json={"notes": "well"}))
    assert job["state"] == "succeeded"
    again = await operator.post(f"{here}/cleanup", json={})
    assert again.status_code == httpx.codes.CONFLICT
    after = (await operator.get(here)).json()
    assert (after["state"], after["notes"]) == (
        "cleaned-up",
        "before the release\nwell",
    )
    assert after["has_console"]
    assert after["has_screenshot"]
    console = await operator.get(f"{here}/console")
    assert (console.text, console.headers["content-type"]) == (
        "login:\N{REPLACEMENT CHARACTER} ",
        "text/plain; charset=utf-8",
    )
    screen = await operator.get(f"{here}/screenshot")
    assert (screen.content, screen.headers["content-type"]) == (PNG, "image/png")
    gone = (await operator.get("failovers", params={"open": False, "machine": "web-1"})).json()
    assert [row["id"] for row in gone["items"]] == [failover["id"]]


async def test_a_failover_is_committed_and_each_step_is_audited(
    rig: Rig, fleet: Fleet, operator: httpx.AsyncClient
) -> None:
    assert "compute-1" in fleet.peers
    failover = await failed_over(operator, "unplanned", point="p1")
    assert (await machine(operator, "failed-over"))["job"] is None
    here = f"failovers/{failover['id']}"
    for what, body in (("change-point", {"point": "p2"}), ("commit", {"delete_points": True})):
        job = await ended(operator, await operator.post(f"{here}/{what}", json=body))
        assert (job["state"], job["error"]) == ("succeeded", None)
    await machine(operator, "committed")
    assert (await operator.post(f"{here}/cancel")).status_code == httpx.codes.CONFLICT
    async with rig.operator() as boss:
        told = (await boss.get("audit")).json()["items"]
    actions = [(entry["action"], entry["outcome"]) for entry in told]
    assert actions[:4] == [
        ("failover.cancel", "conflict"),
        ("failover.commit", "done"),
        ("failover.change-point", "done"),
        ("failover.begin", "done"),
    ]


async def test_points_are_listed_as_their_applier_puts_them_and_locked(
    rig: Rig, fleet: Fleet, operator: httpx.AsyncClient
) -> None:
    points = tuple(
        ListedPoint(name=f"p{number}", position=number, time_ns=number, consistency="crash")
        for number in (1, 2, 3)
    )
    web = fleet.peers["web-1"].node
    listed = PointList(machine=web, points=points).model_dump(mode="json")
    async with rig.node(fleet.peers["applier-1"]) as applier:
        assert (await applier.post("node/points", json=listed)).status_code == 204
        other = {**listed, "machine": str(uuid.uuid4())}
        assert (await applier.post("node/points", json=other)).status_code == 403
    async with rig.node(await rig.enrol(NodeRole.APPLIER)) as stranger:
        assert (await stranger.post("node/points", json=listed)).status_code == 403
    await failed_over(operator, "test", point="p1")
    until_ns = rig.clock() + 10**12
    lock = "machines/web-1/points/p2/lock"
    assert (await operator.post(lock, json={"until_ns": until_ns})).status_code == 403
    async with rig.operator() as boss:
        assert (await boss.post(lock, json={"until_ns": until_ns})).status_code == 200
        assert (await boss.post(lock, json={"until_ns": until_ns - 1})).status_code == 409
        kept = await boss.post("machines/web-1/unprotect", json={"keep_points": False})
        assert kept.status_code == httpx.codes.CONFLICT
        assert "locked" in kept.json()["message"]
    async with asyncio.timeout(WAIT_SECONDS):
        while True:  # until the applier says that it holds it
            answer = await operator.get("machines/web-1/points", params={"limit": 2})
            first = answer.json()
            if first["items"][1]["locked_until_ns"]:
                break
            await asyncio.sleep(0.05)
    unknown = "machines/web-1/points/p9/lock"
    async with rig.operator() as boss:
        assert (await boss.post(unknown, json={"until_ns": until_ns})).status_code == 404
    rest = await operator.get("machines/web-1/points", params={"cursor": first["next"]})
    found = first["items"] + rest.json()["items"]
    assert rest.json()["next"] is None
    assert [(row["name"], row["held"], row["locked_until_ns"]) for row in found] == [
        ("p3", False, 0),
        ("p2", False, until_ns),
        ("p1", True, 0),
    ]
    assert (await operator.get("machines/nobody/points")).status_code == httpx.codes.NOT_FOUND


async def test_what_cannot_be_is_refused_with_a_reason(
    fleet: Fleet, operator: httpx.AsyncClient
) -> None:
    assert "compute-1" in fleet.peers
    planned = await operator.post("machines/web-1/failovers", json={"kind": "planned"})
    assert planned.status_code == httpx.codes.CONFLICT
    assert "no vCenter's inventory" in planned.json()["message"]
    for body in (
        {"kind": "sudden"},
        {"kind": "test", "point": "../../etc"},
        {"kind": "test", "memory_bytes": 1},
        {"kind": "test", "colour": "red"},
    ):
        answer = await operator.post("machines/web-1/failovers", json=body)
        assert answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
    nothing = await operator.post(f"failovers/{uuid.uuid4()}/commit", json={})
    assert nothing.status_code == httpx.codes.NOT_FOUND
    jobs = (await operator.get("jobs")).json()["items"]
    resumed = await operator.post(f"jobs/{jobs[0]['id']}/resume", json={"note": "x"})
    assert resumed.status_code == httpx.codes.CONFLICT

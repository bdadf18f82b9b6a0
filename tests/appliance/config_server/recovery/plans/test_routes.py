"""Plans over the API: kept, changed, copied, run with real scripts and a person in between."""

import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select

from appliance.config_server.recovery.plans.yaml_text import parse_plan
from appliance.config_server.store.recovery_tables import Plan
from appliance.config_server.store.schema import AuditEntry
from replication.control.role import OperatorRole
from tests.appliance.config_server.recovery.actions.orders import write_program
from tests.appliance.config_server.recovery.plans.shop import SHOP
from tests.appliance.config_server.recovery.site import Site, open_site

MANUAL = {"name": "look", "manual": {"instruction": "look at it"}}


def plan(name: str = "small", **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "groups": [
            {"name": "first", "machines": [{"machine": "db-1"}]},
            {"name": "second", "machines": [{"machine": "web-1", "memory_bytes": 1 << 30}]},
        ],
        **changes,
    }


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    write_program(tmp_path / "scripts", "note", f"#!/bin/sh\ncat >> {tmp_path}/noted\n")
    recovery = {"drill_seconds": 0.1, "scripts_folder": str(tmp_path / "scripts")}
    async with open_site(tmp_path, recovery=recovery) as site:
        yield site


@pytest.fixture
async def boss(site: Site) -> AsyncIterator[httpx.AsyncClient]:
    async with site.operator() as client:
        yield client


async def made(boss: httpx.AsyncClient, document: dict[str, Any]) -> dict[str, Any]:
    answer = await boss.post("plans", json=document)
    assert answer.status_code == HTTPStatus.CREATED, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_plans_over_the_api(site: Site, boss: httpx.AsyncClient) -> None:
    """All that needs no machines, with one config server: it takes seconds to open."""
    await made_read_changed_copied_and_deleted(site, boss)
    await what_makes_no_sense_is_refused(boss)
    await secrets_of_headers_are_nowhere(site, boss)
    await who_may_do_what(site)
    await what_is_not_there_is_said(boss)


async def made_read_changed_copied_and_deleted(site: Site, boss: httpx.AsyncClient) -> None:
    found = await made(boss, plan())
    assert [problem["code"] for problem in found["problems"]] == 2 * ["unknown_machine"]
    assert (await boss.get("plans/small")).json()["plan"] == found["plan"]
    (listed,) = (await boss.get("plans")).json()["items"]
    assert (listed["name"], listed["group_count"], listed["machine_count"]) == ("small", 2, 2)

    renamed = {"plan": {**found["plan"], "name": "new"}, "revision": 1}
    changed = (await boss.put("plans/small", json=renamed)).json()
    assert (changed["plan"]["name"], changed["revision"]) == ("new", 2)
    assert (await boss.get("plans/small")).status_code == HTTPStatus.NOT_FOUND
    late = await boss.put("plans/new", json={**renamed, "revision": 1})
    assert late.status_code == HTTPStatus.CONFLICT
    assert "revision 2, not 1" in late.json()["message"]

    assert (await boss.post("plans/new/clone", json={"name": "copy"})).status_code == 201
    for name in ("new", "copy"):  # a plan is no copy of itself, nor takes another's name
        answer = await boss.post("plans/new/clone", json={"name": name})
        assert answer.status_code == HTTPStatus.CONFLICT
    taken = {"plan": {**found["plan"], "name": "copy"}}
    assert (await boss.put("plans/new", json=taken)).status_code == HTTPStatus.CONFLICT
    assert (await boss.post("plans", json=plan("copy"))).status_code == HTTPStatus.CONFLICT

    assert (await boss.delete("plans/copy")).status_code == HTTPStatus.NO_CONTENT
    assert (await boss.delete("plans/copy")).status_code == HTTPStatus.NOT_FOUND
    async with site.control.server.database.reading() as session:
        actions = list(await session.scalars(select(AuditEntry.action)))
    for action in ("plan.create", "plan.change", "plan.clone", "plan.delete"):
        assert action in actions


REFUSED = (
    (plan(groups=[]), "at least 1"),
    (plan(groups=[{"name": "g"}]), "no machine"),
    (plan(groups=[*plan()["groups"], plan()["groups"][0]]), "both called first"),
    (plan(groups=[*plan()["groups"], {"name": "x"}]), "neither machines nor actions"),
    (plan(more=1), "more"),
    (plan("a/b"), "name"),
    (plan(groups=[{"name": "g", "machines": [{"machine": "a\0"}]}]), "machine"),
)


async def what_makes_no_sense_is_refused(boss: httpx.AsyncClient) -> None:
    for document, told in REFUSED:
        answer = await boss.post("plans", json=document)
        assert answer.status_code == HTTPStatus.UNPROCESSABLE_ENTITY
        assert told in answer.text


async def secrets_of_headers_are_nowhere(site: Site, boss: httpx.AsyncClient) -> None:
    document = parse_plan(SHOP).model_dump(mode="json")
    found = await made(boss, document)
    assert "let-me-in" not in json.dumps(found)
    answer = await boss.put("plans/shop", json={"plan": found["plan"], "revision": 1})
    assert answer.status_code == HTTPStatus.OK, answer.text
    await boss.post("plans/shop/clone", json={"name": "shop2"})
    async with site.control.server.database.reading() as session:
        entries = list(await session.scalars(select(AuditEntry)))
        rows = list(await session.scalars(select(Plan).where(Plan.name.startswith("shop"))))
    assert "let-me-in" not in f"{[entry.detail for entry in entries]}"
    assert "let-me-in" not in f"{[row.document for row in rows]}"
    sealed = [
        row.document["groups"][1]["after"][1]["webhook"]["headers"]["Authorization"] for row in rows
    ]
    assert len(sealed) == 2
    assert sealed[0] == sealed[1]
    problems = [each["code"] for each in found["problems"]]
    assert problems.count("action_refused") == 2  # no such program; no keys for SSH


async def test_a_plan_is_validated_and_run(
    site: Site, boss: httpx.AsyncClient, tmp_path: Path
) -> None:
    await validation_says_what_stands_against_a_plan(site, boss)
    await a_run_waits_for_a_person_and_is_cleaned_up(site, boss, tmp_path)


async def validation_says_what_stands_against_a_plan(site: Site, boss: httpx.AsyncClient) -> None:
    await made(boss, plan())
    found = (await boss.get("plans/small/validation")).json()
    assert found["valid"] is False
    refused = await boss.post("plans/small/runs", json={"kind": "test"})
    assert refused.status_code == HTTPStatus.UNPROCESSABLE_ENTITY
    assert "groups.0.machines.0: there is no machine db-1" in refused.json()["message"]
    await site.protected("web-1", "db-1")
    found = (await boss.get("plans/small/validation", params={"kind": "planned"})).json()
    assert found == {"valid": True, "problems": []}
    params = {"point": "latest-app-consistent"}
    found = (await boss.get("plans/small/validation", params=params)).json()
    assert [each["code"] for each in found["problems"]] == ["no_common_consistency"]


async def who_may_do_what(site: Site) -> None:
    forbidden = HTTPStatus.FORBIDDEN
    async with (
        site.operator(OperatorRole.READER) as reader,
        site.operator(OperatorRole.OPERATOR) as operator,
    ):
        assert (await reader.get("plans/shop")).status_code == HTTPStatus.OK
        assert (await operator.post("plans", json=plan("x"))).status_code == forbidden
        assert (await operator.delete("plans/shop")).status_code == forbidden
        for path in ("plans/small/runs", "drills", f"runs/{site.nodes.clock()}/cleanup"):
            assert (await reader.post(path, json={})).status_code == forbidden


async def a_run_waits_for_a_person_and_is_cleaned_up(
    site: Site, boss: httpx.AsyncClient, tmp_path: Path
) -> None:
    document = plan()
    note = {"name": "note", "script": {"command": "note"}}
    document["groups"][0] |= {"before": [note], "after": [MANUAL]}
    document["groups"][1]["after"] = [
        {"name": "shell", "script": {"inline": "true"}, "on_failure": "continue"}
    ]
    # Inline scripts are not allowed here: that is found before anything begins.
    assert (await boss.put("plans/small", json={"plan": document})).status_code == HTTPStatus.OK
    answer = await boss.post("plans/small/runs", json={"kind": "test"})
    assert answer.status_code == HTTPStatus.UNPROCESSABLE_ENTITY
    assert "groups.1.after.0: shell: this config server runs no inline" in answer.json()["message"]
    document["groups"][1]["after"] = [note]
    assert (await boss.put("plans/small", json={"plan": document})).status_code == HTTPStatus.OK

    job = (await boss.post("plans/small/runs", json={"kind": "test", "notes": "spring"})).json()
    assert job["kind"] == "test-failover", job
    (run,) = (await boss.get("plans/small/runs")).json()["items"]
    assert (run["machine_count"], run["open"], run["notes"]) == (2, True, "spring")
    waiting = await site.seen(f"jobs/{job['id']}", "state", "running")
    while not any("look at it" in step["note"] for step in waiting["steps"]):
        waiting = await site.seen(f"jobs/{job['id']}", "state", "running")
    answer = await boss.post(f"jobs/{job['id']}/resume", json={"note": "it looks well"})
    assert answer.status_code == HTTPStatus.ACCEPTED, answer.text
    assert (await site.ended(job["id"]))["state"] == "succeeded"
    again = await boss.post(f"jobs/{job['id']}/resume", json={})
    assert again.status_code == HTTPStatus.CONFLICT

    found = (await boss.get(f"runs/{run['id']}")).json()
    assert [(each["machine"], each["group"], each["state"]) for each in found["failovers"]] == [
        ("db-1", 1, "up"),
        ("web-1", 2, "up"),
    ]
    assert [(each["group"], each["place"], each["state"]) for each in found["actions"]] == [
        (1, "before", "done"),
        (1, "after", "done"),
        (2, "after", "done"),
    ]
    assert found["actions"][1]["note"] == "it looks well"
    first, second = map(json.loads, (tmp_path / "noted").read_text().splitlines())
    assert (first["GroupId"], first["Place"], first["Attempt"]) == ("1", "before", 1)
    assert first["FailoverType"] == "Test"
    states = {vm["RoleName"]: (vm["State"], vm["Address"]) for vm in second["VmMap"].values()}
    assert states == {"db-1": ("up", "10.0.0.2"), "web-1": ("up", "10.0.0.2")}

    job = (await boss.post(f"runs/{run['id']}/cleanup", json={"notes": "all well"})).json()
    assert (await site.ended(job["id"]))["state"] == "succeeded"
    found = (await boss.get(f"runs/{run['id']}")).json()
    assert (found["open"], found["notes"]) == (False, "spring\nall well")
    answer = await boss.post(f"runs/{run['id']}/cleanup", json={"notes": ""})
    assert answer.status_code == HTTPStatus.CONFLICT


async def what_is_not_there_is_said(boss: httpx.AsyncClient) -> None:
    nothing = "00000000-0000-4000-8000-000000000000"
    for path in (
        "plans/x",
        "plans/x/runs",
        "plans/x/validation",
        f"runs/{nothing}",
        f"drills/{nothing}",
    ):
        assert (await boss.get(path)).status_code == HTTPStatus.NOT_FOUND, path
    for path, body in (
        ("plans/x/runs", {"kind": "test"}),
        ("plans/x/clone", {"name": "y"}),
        ("drills", {"plan": "x"}),
        ("drills", {"machine": "x"}),
        (f"runs/{nothing}/cleanup", {}),
    ):
        answer = await boss.post(path, json=body)
        assert answer.status_code == HTTPStatus.NOT_FOUND, answer.text

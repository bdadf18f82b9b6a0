"""``health``, ``events`` and ``components`` as a caller sees them."""

from pathlib import Path
from typing import Any

import httpx
from prometheus_client import generate_latest

from appliance.config_server.store.schema import Event
from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.running import Rig, open_rig
from tests.appliance.config_server.watching.scene import (
    APPLIER,
    MACHINE,
    NS,
    PROCESS_SERVER,
    VCENTER,
    report_all,
    set_scene,
)


async def read(caller: httpx.AsyncClient, path: str, **params: Any) -> Any:
    answer = await caller.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_health_of_everything(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        reader = rig.operator(OperatorRole.READER)
        empty = await read(reader, "health")
        assert (empty["state"], empty["unwell"]) == ("normal", [])
        await set_scene(rig.server.database, rig.clock())
        await report_all(rig.server.database, rig.clock(), cpu_share=0.97)
        await rig.server.watching.watcher.look()
        told = await read(reader, "health")
        assert told["state"] == "critical"
        assert told["machines"] == {"normal": 0, "warning": 1, "critical": 0}
        assert told["components"] == {"normal": 2, "warning": 0, "critical": 1}
        assert [(one["kind"], one["name"]) for one in told["unwell"]] == [
            ("process-server", "ps-1"),
            ("machine", "db-01"),
        ]
        machine = await read(reader, f"machines/{MACHINE}")
        assert (machine["point_count"], machine["space_bytes"]) == (3, 10 << 30)
        (reason,) = told["unwell"][0]["health"]["reasons"]
        assert reason["code"] == "cpu-high"
        assert reason["message"] == "its host's CPU use is 97 %"
        assert reason["cause"]
        assert reason["action"]


async def test_health_by_id_is_not_that_of_one_which_is_called_so(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await set_scene(rig.server.database, rig.clock())
        await rig.enrol(NodeRole.APPLIER, name=str(MACHINE))
        await rig.enrol(NodeRole.APPLIER, name="vc-1")
        reader = rig.operator(OperatorRole.READER)
        assert (await read(reader, f"health/{MACHINE}"))["kind"] == "machine"
        assert (await reader.get("health/vc-1")).status_code == 409


async def test_health_of_one_by_id_and_by_name(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await set_scene(rig.server.database, rig.clock())
        reader = rig.operator(OperatorRole.READER)
        for source in (MACHINE, "db-01"):
            told = await read(reader, f"health/{source}")
            assert (told["kind"], told["id"], told["health"]) == (
                "machine",
                str(MACHINE),
                {"state": "normal", "reasons": []},
            )
            assert 5 <= told["rpo_durable_seconds"] < 60
            assert 7 <= told["rpo_restorable_seconds"] < 60
        for source in (PROCESS_SERVER, APPLIER, VCENTER, "vc-1"):
            assert (await read(reader, f"health/{source}"))["rpo_durable_seconds"] is None
        missing = await reader.get("health/nobody")
        assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


async def test_rpo_is_of_the_moment_of_asking(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await set_scene(rig.server.database, rig.clock())
        reader = rig.operator(OperatorRole.READER)
        first = await read(reader, "health/db-01")
        rig.clock.ahead_ns += 10 * NS
        second = await read(reader, "health/db-01")
        assert second["rpo_durable_seconds"] >= first["rpo_durable_seconds"] + 10


async def fill_events(rig: Rig) -> None:
    async with rig.server.database.writing() as session:
        for index in range(10):
            session.add(
                Event(
                    id=index + 1,
                    at_ns=index * 100,
                    code="cpu-high",
                    severity="critical" if index % 3 == 0 else "warning",
                    source_id=MACHINE if index % 2 else PROCESS_SERVER,
                    source="db-01" if index % 2 else "ps-1",
                    message="m",
                    cleared_ns=None if index > 6 else index * 100 + 50,
                )
            )


async def test_events_are_filtered_and_paged_newest_first(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await fill_events(rig)
        reader = rig.operator(OperatorRole.READER)

        async def ids(**params: Any) -> list[int]:
            return [event["id"] for event in (await read(reader, "events", **params))["items"]]

        assert await ids() == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]
        assert await ids(open="true") == [10, 9, 8]
        assert await ids(open="false") == [7, 6, 5, 4, 3, 2, 1]
        assert await ids(severity="critical") == [10, 7, 4, 1]
        assert await ids(machine="db-01") == await ids(machine=str(MACHINE)) == [10, 8, 6, 4, 2]
        assert await ids(machine="ps-1", open="true") == [9]
        assert await ids(since_ns=650) == [10, 9, 8, 7], "opened or cleared since"
        first = await read(reader, "events", limit=4)
        second = await read(reader, "events", limit=4, cursor=first["next"])
        assert [event["id"] for event in first["items"] + second["items"]] == list(range(10, 2, -1))
        for wrong in ({"severity": "fatal"}, {"since_ns": -1}, {"open": "perhaps"}):
            assert (await reader.get("events", params=wrong)).status_code == 422


async def test_components_with_load_and_health(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await set_scene(rig.server.database, rig.clock())
        reader = rig.operator(OperatorRole.READER)
        told = await read(reader, "components")
        by_kind = {one["kind"]: one for one in told["items"]}
        assert list(by_kind) == ["applier", "process-server", "vcenter"]
        server = by_kind["process-server"]
        assert (server["cpu_share"], server["memory_used_bytes"]) == (0.2, 400)
        assert (server["spool_bytes"], server["spool_max_bytes"]) == (100, 1000)
        assert (server["url"], server["software"]) == ("https://ps:9443", "1.2")
        assert (server["machine_count"], server["backlog_seconds"]) == (1, 2.0)
        assert abs(server["skew_seconds"]) < 1
        assert by_kind["applier"]["store_bytes"] == 10 << 30
        assert by_kind["vcenter"]["cpu_share"] is None
        pages: list[str] = []
        cursor: str | None = None
        while True:
            params = {"limit": 1} | ({"cursor": cursor} if cursor else {})
            page = await read(reader, "components", **params)
            pages += [one["name"] for one in page["items"]]
            cursor = page["next"]
            if cursor is None:
                break
        assert pages == ["applier-1", "ps-1", "vc-1"]


async def test_measures_tell_of_machines_components_and_requests(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await set_scene(rig.server.database, rig.clock())
        reader = rig.operator(OperatorRole.READER)
        await read(reader, "health/db-01")
        await reader.get("health/nobody-of-this-name")
        await reader.get("no/such/route")
        await rig.server.watching.watcher.look()
        told = generate_latest(rig.server.registry).decode()
        requests = "understudy_config_server_requests_total"
        for line in (
            'understudy_config_server_machines{state="protected"} 1.0',
            'understudy_config_server_machines{state="unprotected"} 0.0',
            'understudy_config_server_machine_health{health="normal"} 1.0',
            'understudy_config_server_nodes{health="normal",role="applier"} 1.0',
            'understudy_config_server_events_open{severity="critical"} 0.0',
            'understudy_config_server_jobs{state="running"} 0.0',
            "understudy_config_server_watching 1.0",
            f'{requests}{{method="GET",route="/api/v1/health/{{source}}",status="200"}} 1.0',
            f'{requests}{{method="GET",route="/api/v1/health/{{source}}",status="404"}} 1.0',
            f'{requests}{{method="GET",route="none",status="404"}} 1.0',
        ):
            assert line in told
        assert 'rpo_durable_seconds{machine="db-01"}' in told
        assert "nobody-of-this-name" not in told

"""The audit log: what nodes can do to it, and its bounds."""

import asyncio
import uuid
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import func, insert, select
from structlog.testing import capture_logs

from appliance.config_server.audit import REFUSALS_PER_MINUTE_MAX
from appliance.config_server.audit_pruning import HEALTH_PART, Pruned, keep_pruning, prune_all
from appliance.config_server.config import AuditConfig
from appliance.config_server.identity import data_keys
from appliance.config_server.identity.data_keys import KeyRates
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import AuditEntry, Machine
from daemon.service import Health
from replication.control.assignment import MACHINE_COUNT_MAX
from replication.control.role import NodeRole
from tests.appliance.config_server.running import Rig, open_rig

NOW_NS = 2_000 * 86400 * 10**9
DAY_NS = 86400 * 10**9
FREE = {
    "requests_per_second": 10_000,
    "requests_burst": 10_000,
    "node_requests_per_second": 10_000,
    "node_requests_burst": 10_000,
}


async def outcomes(rig: Rig) -> list[str]:
    async with rig.server.database.reading() as session:
        query = select(AuditEntry.outcome).where(AuditEntry.action == "data-key.give")
        return list(await session.scalars(query.order_by(AuditEntry.id)))


async def test_a_node_gets_a_few_data_keys_a_minute(tmp_path: Path) -> None:
    async with open_rig(tmp_path, limits={**FREE, "data_keys_per_minute": 4}) as rig:
        peer = await rig.enrol(NodeRole.MACHINE)
        async with rig.server.database.writing() as session:
            session.add(Machine(id=peer.node, name="web", state="enabling", since_ns=0))
            await data_keys.ensure(session, rig.server.identity.vault, peer.node, 1)
        agent = rig.node(peer)
        answers = [await agent.get(f"node/data-keys/{peer.node}") for _ in range(10)]
        assert [answer.status_code for answer in answers] == [200] * 4 + [429] * 6
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 15
        assert await outcomes(rig) == ["done"] * 4
        other = await rig.enrol(NodeRole.MACHINE)
        assert (await rig.node(other).get(f"node/data-keys/{other.node}")).status_code == 404


def test_an_applier_gets_one_of_each_of_its_machines_at_once() -> None:
    now = 0.0
    rates = KeyRates(6, now=lambda: now)
    node = uuid.UUID(int=1)
    waits = [rates.take(NodeRole.APPLIER, node) for _ in range(MACHINE_COUNT_MAX + 1)]
    assert waits[:-1] == [0.0] * MACHINE_COUNT_MAX
    assert waits[-1] == 10.0
    now = 10.0
    assert [rates.take(NodeRole.APPLIER, node) > 0 for _ in range(2)] == [False, True]


async def test_refusals_of_nodes_are_not_all_written(tmp_path: Path) -> None:
    asked = 3 * REFUSALS_PER_MINUTE_MAX
    async with open_rig(tmp_path, limits=FREE) as rig:
        applier = rig.node(await rig.enrol(NodeRole.APPLIER))
        for _ in range(asked):
            answer = await applier.get(f"node/data-keys/{uuid.uuid4()}")
            assert answer.status_code == 403
        assert await outcomes(rig) == ["forbidden"] * REFUSALS_PER_MINUTE_MAX


async def test_refusals_of_operators_are_all_written(tmp_path: Path) -> None:
    async with open_rig(tmp_path, limits=FREE) as rig:
        operator = rig.operator()
        for _ in range(REFUSALS_PER_MINUTE_MAX + 5):
            assert (await operator.delete("policies/none")).status_code == 404
        async with rig.server.database.reading() as session:
            query = select(func.count()).where(AuditEntry.action == "policy.delete")
            assert await session.scalar(query) == REFUSALS_PER_MINUTE_MAX + 5


async def fill(database: Database, days_old: Sequence[float]) -> None:
    row = {"who": "w", "role": "", "source": "", "action": "a", "target": "", "outcome": "done"}
    rows = [{**row, "at_ns": int(NOW_NS - days * DAY_NS), "detail": {}} for days in days_old]
    async with database.writing() as session:
        await session.execute(insert(AuditEntry), rows)


async def ages(database: Database) -> list[float]:
    async with database.reading() as session:
        found = await session.scalars(select(AuditEntry.at_ns).order_by(AuditEntry.id))
        return [(NOW_NS - at_ns) / DAY_NS for at_ns in found]


async def test_what_is_too_old_goes_and_nothing_else(database_url: str) -> None:
    async with open_database(database_url) as database:
        await fill(database, [11] * 2500 + [10, 9, 0])
        assert await prune_all(database, AuditConfig(days=10), NOW_NS) == Pruned(old=2500)
        assert await ages(database) == [10, 9, 0]
        assert await prune_all(database, AuditConfig(days=10), NOW_NS) == Pruned()


async def test_what_is_too_much_goes_oldest_first_and_is_told(database_url: str) -> None:
    async with open_database(database_url) as database:
        await fill(database, [500, *([3] * 1500), *([1] * 1000)])
        with capture_logs() as logs:
            pruned = await prune_all(database, AuditConfig(days=400, count_max=1000), NOW_NS)
        assert pruned == Pruned(old=1, excess=1500)
        assert await ages(database) == [1] * 1000
        assert [log["count"] for log in logs] == [1500]


async def test_gaps_in_the_numbers_cost_no_entry(database_url: str) -> None:
    async with open_database(database_url) as database:
        await fill(database, [1])
        async with database.writing() as session:
            last = await session.scalar(select(func.max(AuditEntry.id))) or 0
            session.add(
                AuditEntry(
                    id=last + 5000,
                    at_ns=NOW_NS,
                    who="w",
                    role="",
                    source="",
                    action="a",
                    target="",
                    outcome="done",
                    detail={},
                )
            )
        assert await prune_all(database, AuditConfig(count_max=1000), NOW_NS) == Pruned()


async def test_pruning_goes_on_in_the_background_and_health_tells_of_it(
    database_url: str,
) -> None:
    async with open_database(database_url) as database:
        await fill(database, [1] * 1200)
        health = Health()
        config = AuditConfig(count_max=1000)
        pruning = asyncio.create_task(keep_pruning(database, config, health, lambda: NOW_NS))
        try:
            async with asyncio.timeout(20):
                while not health.warnings:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.02)
        finally:
            pruning.cancel()
            await asyncio.gather(pruning, return_exceptions=True)
        assert "200 entries younger than 400 days" in health.warnings[HEALTH_PART]
        assert len(await ages(database)) == 1000

"""From reports in the database to events in the database."""

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import pytest
from sqlalchemy import func, select
from structlog.testing import capture_logs

from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import (
    Certificate,
    Event,
    Machine,
    Node,
    Policy,
    VCenter,
)
from appliance.config_server.watching.assessment import Assessment
from appliance.config_server.watching.config import WatchingConfig
from appliance.config_server.watching.events import prune
from appliance.config_server.watching.health import machine_rpo
from appliance.config_server.watching.lease import LEASE_SECONDS
from appliance.config_server.watching.reason import Code, Severity, State
from appliance.config_server.watching.rpo import NO_RPO
from appliance.config_server.watching.watcher import Watcher
from daemon.service import Health
from replication.control.report import read_report
from replication.errors import ConflictError, ReplicationError
from tests.appliance.config_server.watching.scene import (
    APPLIER,
    DAY_NS,
    MACHINE,
    NS,
    PROCESS_SERVER,
    VCENTER,
    add_job,
    machine_report,
    process_server_report,
    report,
    report_all,
    set_scene,
)

CONFIG = WatchingConfig(settle_seconds=20, clear_seconds=60)


@dataclass
class Clock:
    now_ns: int

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> int:
        self.now_ns += int(seconds * NS)
        return self.now_ns


class Rig:
    def __init__(self, database: Database, clock: Clock) -> None:
        self.database = database
        self.clock = clock
        self.watcher = self.watch()

    def watch(self) -> Watcher:
        return Watcher(self.database, CONFIG, Health(), self.clock)

    async def look_for(
        self, seconds: int, *, cpu_share: float = 0.2, watcher: Watcher | None = None
    ) -> None:
        """A look every 5 s, with fresh reports."""
        for _ in range(0, seconds, 5):
            now_ns = self.clock.advance(5)
            await report_all(self.database, now_ns, cpu_share=cpu_share)
            await (watcher or self.watcher).look()

    async def events(self) -> list[tuple[str, str, str, bool]]:
        async with self.database.reading() as session:
            rows = await session.scalars(select(Event).order_by(Event.id))
            return [(row.source, row.code, row.severity, row.cleared_ns is None) for row in rows]


@pytest.fixture
async def rig(database_url: str) -> Any:
    async with open_database(database_url) as database:
        clock = Clock(time.time_ns())
        await set_scene(database, clock())
        yield Rig(database, clock)


async def test_all_is_well(rig: Rig) -> None:
    assessment = await rig.watcher.look()
    assert {health.state for _, health in assessment.sources().values()} == {State.NORMAL}
    machine = assessment.machines[MACHINE]
    assert machine.rpo.durable_seconds == 5
    assert machine.rpo.restorable_seconds == 7, "the applier knows of a newer point"
    assert machine.facts.process_server is not None
    assert machine.facts.process_server.name == "ps-1"
    assert await rig.events() == []


async def test_an_event_opens_after_settling_and_is_cleared_after_a_while(rig: Rig) -> None:
    await rig.look_for(20, cpu_share=0.9)
    assert await rig.events() == []
    await rig.look_for(5, cpu_share=0.9)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", True)]
    await rig.look_for(60)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", True)]
    await rig.look_for(5)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", False)]


async def test_worsening_is_an_event_of_its_own(rig: Rig) -> None:
    await rig.look_for(25, cpu_share=0.9)
    await rig.look_for(25, cpu_share=0.99)
    assert await rig.events() == [
        ("ps-1", "cpu-high", "warning", False),
        ("ps-1", "cpu-high", "critical", True),
    ]
    assert rig.watcher.open_counts == {Severity.WARNING: 0, Severity.CRITICAL: 1}


async def test_flapping_makes_one_event(rig: Rig) -> None:
    for _ in range(4):
        await rig.look_for(25, cpu_share=0.9)
        await rig.look_for(30)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", True)]


async def test_a_restart_neither_repeats_nor_forgets_events(rig: Rig) -> None:
    await rig.look_for(25, cpu_share=0.9)
    rig.clock.advance(LEASE_SECONDS + 1)
    second = rig.watch()
    await rig.look_for(30, cpu_share=0.9, watcher=second)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", True)]
    await rig.look_for(70, watcher=second)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", False)]


async def test_one_of_two_writes_and_the_other_takes_over(rig: Rig) -> None:
    first, second = rig.watcher, rig.watch()
    for _ in range(8):
        now_ns = rig.clock.advance(5)
        await report_all(rig.database, now_ns, cpu_share=0.9)
        await first.look()
        await second.look()
    assert await rig.events() == [("ps-1", "cpu-high", "warning", True)]
    assert (rig.watcher.open_counts is None, second.open_counts is None) == (False, True)
    assert second.assessment.nodes[PROCESS_SERVER].health.state is State.WARNING
    await rig.look_for(LEASE_SECONDS + 70, watcher=second)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", False)]
    await rig.look_for(10, cpu_share=0.9, watcher=first)
    assert rig.watcher.open_counts is None, "it noticed that the lease is another's"
    assert len(await rig.events()) == 1


async def test_two_at_the_same_moment_write_each_event_once(rig: Rig) -> None:
    watchers = [rig.watch() for _ in range(3)]
    for _ in range(8):
        now_ns = rig.clock.advance(5)
        await report_all(rig.database, now_ns, cpu_share=0.9)
        looks = [watcher.look() for watcher in watchers]
        told = await asyncio.gather(*looks, return_exceptions=True)
        # Who comes second with the very first row of the lease is told so, and looks again later.
        assert all(isinstance(one, Assessment | ConflictError) for one in told)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", True)]
    assert sum(watcher.open_counts is not None for watcher in watchers) == 1


async def test_who_was_stopped_for_long_reads_again_what_is_open(rig: Rig) -> None:
    first, second = rig.watcher, rig.watch()
    await rig.look_for(25, cpu_share=0.9, watcher=first)
    await rig.look_for(LEASE_SECONDS + 90, watcher=second)
    assert await rig.events() == [("ps-1", "cpu-high", "warning", False)]
    rig.clock.advance(LEASE_SECONDS + 1)
    await rig.look_for(30, cpu_share=0.9, watcher=first)
    assert [is_open for *_, is_open in await rig.events()] == [False, True]


async def test_a_silent_process_server_is_one_event_and_not_one_for_each_machine(
    rig: Rig,
) -> None:
    for _ in range(0, 1000, 10):
        now_ns = rig.clock.advance(10)
        await report(rig.database, MACHINE, machine_report(now_ns), now_ns)
        await rig.watcher.look()
    assessment = rig.watcher.assessment
    reasons = {reason.code for reason in assessment.machines[MACHINE].health.reasons}
    assert {Code.PROCESS_SERVER_UNWELL, Code.APPLIER_UNWELL} <= reasons
    opened = [event for event in await rig.events() if event[3]]
    assert sorted(opened) == [
        ("applier-1", "node-silent", "critical", True),
        ("ps-1", "node-silent", "critical", True),
    ]


async def test_what_is_gone_has_no_open_events(rig: Rig) -> None:
    async with rig.database.writing() as session:
        row = await session.get(VCenter, VCENTER)
        assert row is not None
        row.state, row.reason = "unreachable", "no route"
    await rig.look_for(25)
    assert await rig.events() == [("vc-1", "vcenter-unreachable", "warning", True)]
    async with rig.database.writing() as session:
        await session.delete(await session.get(VCenter, VCENTER))
    await rig.look_for(70)
    assert await rig.events() == [("vc-1", "vcenter-unreachable", "warning", False)]


async def test_a_retired_component_is_not_missed(rig: Rig) -> None:
    async with rig.database.writing() as session:
        certificate = await session.get(Certificate, f"{PROCESS_SERVER.int:x}")
        assert certificate is not None
        certificate.revoked_ns = rig.clock()
    assert PROCESS_SERVER in (await rig.watcher.look()).nodes, "a machine still needs it"
    async with rig.database.writing() as session:
        machine = await session.get(Machine, MACHINE)
        assert machine is not None
        machine.process_server_id = None
    nodes = (await rig.watcher.look()).nodes
    assert PROCESS_SERVER not in nodes
    assert APPLIER in nodes


async def test_the_newest_job_of_a_machine_counts(rig: Rig) -> None:
    now_ns = rig.clock()
    await add_job(rig.database, "001", "failed", now_ns - NS, "no such disk")
    await add_job(rig.database, "000", "succeeded", now_ns - 2 * NS)
    (reason,) = (await rig.watcher.look()).machines[MACHINE].health.reasons
    assert (reason.code, reason.message) == (
        Code.JOB_FAILED,
        "protect failed: no such disk",
    )
    await add_job(rig.database, "002", "running", now_ns)
    assessment = await rig.watcher.look()
    assert assessment.machines[MACHINE].health.state is State.NORMAL
    assert assessment.job_counts == {"failed": 1, "succeeded": 1, "running": 1}


async def test_a_policy_that_asks_for_app_points_now_gives_them_time(rig: Rig) -> None:
    await rig.watcher.look()
    async with rig.database.writing() as session:
        (policy,) = (await session.scalars(select(Policy))).all()
        policy.app_frequency_seconds = 3600
    await rig.look_for(60)
    assert rig.watcher.assessment.machines[MACHINE].health.state is State.NORMAL
    rig.clock.advance(3600 + 900)
    await rig.look_for(5)
    (reason,) = rig.watcher.assessment.machines[MACHINE].health.reasons
    assert reason.code is Code.NO_APP_POINT


async def test_a_report_that_cannot_be_read_is_none(rig: Rig) -> None:
    async with rig.database.writing() as session:
        node = await session.get(Node, PROCESS_SERVER)
        assert node is not None
        node.report, node.seen_ns = {"kind": "of next year"}, rig.clock()
    assessment = await rig.watcher.look()
    assert assessment.nodes[PROCESS_SERVER].facts.report is None


async def test_only_newer_reports_are_read(rig: Rig) -> None:
    first = await rig.watcher.look()
    second = await rig.watcher.look()
    before, after = first.machines[MACHINE].facts, second.machines[MACHINE].facts
    assert after.report is before.report
    now_ns = rig.clock.advance(1)
    await report(rig.database, PROCESS_SERVER, process_server_report(now_ns), now_ns)
    third = await rig.watcher.look()
    assert third.machines[MACHINE].facts.report is before.report
    assert third.nodes[PROCESS_SERVER].facts.received_ns == now_ns


async def test_old_and_excess_events_are_deleted_and_open_ones_stay(rig: Rig) -> None:
    now_ns = rig.clock()
    async with rig.database.writing() as session:
        for index in range(1500):
            session.add(
                Event(
                    at_ns=now_ns - index * DAY_NS,
                    code="cpu-high",
                    severity="warning",
                    source="x",
                    message="m",
                    cleared_ns=None if index >= 1490 else now_ns - index * DAY_NS,
                )
            )
    config = WatchingConfig(event_days=1200, event_count_max=1000)
    deleted: list[int] = []
    while not deleted or deleted[-1]:
        async with rig.database.writing() as session:
            deleted.append(await prune(session, config, now_ns))
    assert deleted == [289, 211, 0]
    async with rig.database.reading() as session:
        left = await session.scalar(select(func.count()).select_from(Event))
        still_open = await session.scalar(
            select(func.count()).select_from(Event).where(Event.cleared_ns.is_(None))
        )
    assert (left, still_open) == (1000, 10)


async def test_a_database_that_is_away_does_not_end_the_watch(rig: Rig) -> None:
    await rig.database.engine.dispose()
    async with rig.database.writing() as session:
        await session.execute(select(Event))
        connection = await session.connection()
        await connection.exec_driver_sql("ALTER TABLE machines RENAME TO elsewhere")
    with pytest.raises(ReplicationError):
        await rig.watcher.look()


async def test_what_cannot_be_assessed_of_one_harms_no_other(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a number that no clock shows had passed the bounds of a report."""

    def unbounded(document: Any) -> Any:
        return read_report(document).model_copy(update={"time_ns": 10**400})  # type: ignore[union-attr]

    await rig.watcher.look()
    monkeypatch.setattr("appliance.config_server.watching.facts.read_report", unbounded)
    now_ns = rig.clock.advance(1)
    for node, told in (
        (MACHINE, machine_report(now_ns)),
        (PROCESS_SERVER, process_server_report(now_ns)),
    ):
        await report(rig.database, node, told, now_ns)
    health = Health()
    watcher = Watcher(rig.database, CONFIG, health, rig.clock)
    with capture_logs() as logs:
        for _ in range(2):
            assessment = await watcher.look(events=False)
        watching = asyncio.create_task(watcher.run())
        async with asyncio.timeout(10):
            while not health.criticals:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert [log["event"] for log in logs] == ["health cannot be told"] * 3, "once of each"
    assert "db-01" in health.criticals["watching"]
    for node in (MACHINE, PROCESS_SERVER):
        name, told_health = assessment.sources()[node]
        (reason,) = told_health.reasons
        assert (reason.code, reason.severity) == (Code.DEFECT, Severity.CRITICAL), name
    assert machine_rpo(assessment.machines[MACHINE].facts, now_ns) == NO_RPO
    assert assessment.vcenters[VCENTER].health.state is State.NORMAL
    monkeypatch.undo()
    await report_all(rig.database, rig.clock.advance(1))
    assert (await watcher.look()).defects == {}

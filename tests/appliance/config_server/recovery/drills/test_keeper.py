"""Drills from the request to the report, by hand and by schedule, also over kills and of two
config servers.
"""

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from appliance.config_server.api.routes.drills import _outcomes
from appliance.config_server.audit import Audit
from appliance.config_server.identity.vault_key import VaultKey
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.recovery.drills import keeper as keeping
from appliance.config_server.recovery.drills.holding import (
    ScheduleDocument,
    add_schedule,
    begin_drill,
    delete_schedule,
    find_drill,
)
from appliance.config_server.recovery.drills.keeper import LEASE_KEY, DrillKeeper
from appliance.config_server.recovery.drills.report import is_untouched
from appliance.config_server.recovery.drills.schedule import Timing, next_at
from appliance.config_server.recovery.intake import take_evidence
from appliance.config_server.recovery.plans.catalogue import create_plan, delete_plan
from appliance.config_server.recovery.plans.running import RunRequest
from appliance.config_server.store.recovery_tables import DrillReport, DrillSchedule, RecoveredVm
from appliance.config_server.store.schema import AuditEntry, Setting
from appliance.config_server.watching.facts import FactReader
from appliance.config_server.watching.work_health import ScheduleFacts
from replication.control.recovery import EvidenceKind
from replication.errors import ConflictError
from tests.appliance.config_server.protection.stage import MACHINE, WAIT_SECONDS
from tests.appliance.config_server.recovery.drills.evidence import png
from tests.appliance.config_server.recovery.plans.shop import document
from tests.appliance.config_server.recovery.stage import (
    COMPUTE,
    OTHER,
    RecoveryStage,
    open_recovery,
)

VAULT = VaultKey.create()
DAY_NS = 86400 * 10**9
DAILY = ScheduleDocument(timing=Timing(every_days=1, at="03:00"), request=RunRequest())
ACTION = {"name": "tell", "webhook": {"url": "http://127.0.0.1:1/"}}


def keeper_of(stage: RecoveryStage, instance: str = "one", **config: Any) -> DrillKeeper:
    return DrillKeeper(
        stage.database,
        stage.protection.ports,
        Audit(stage.database, stage.clock),
        RecoveryConfig.model_validate({"evidence_seconds": 0, **config}),
        stage.clock,
        instance,
        stage.protection.begin,
    )


async def missed(stage: RecoveryStage, days: int) -> None:
    """As if no config server had run for so long: all schedules have been due since."""
    async with stage.database.writing() as session:
        for row in await session.scalars(select(DrillSchedule)):
            row.next_ns -= days * DAY_NS


async def lease_runs_out(stage: RecoveryStage) -> None:
    async with stage.database.writing() as session:
        row = await session.get_one(Setting, LEASE_KEY)
        row.value = {**row.value, "until_ns": stage.clock() - 1}


async def reports(stage: RecoveryStage) -> list[DrillReport]:
    async with stage.database.reading() as session:
        return list(await session.scalars(select(DrillReport).order_by(DrillReport.began_ns)))


async def ended(stage: RecoveryStage, keeper: DrillKeeper, drill: uuid.UUID) -> DrillReport:
    """A drill, when its report is there; each look is by a keeper that remembers nothing."""
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            await replace(keeper).look()
            await stage.recovery.look()
            async with stage.database.reading() as session:
                row = await find_drill(session, drill)
            if row.state in ("passed", "failed"):
                return row
            await asyncio.sleep(0.02)


async def schedule(stage: RecoveryStage, name: str = "nightly", **of: Any) -> DrillSchedule:
    async with stage.asking() as asking:
        return await add_schedule(
            asking.session,
            name,
            DAILY,
            **{"plan": "", "machine": None, **of},
            who=asking.who,
            now_ns=asking.now_ns,
        )


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[RecoveryStage]:
    async with open_recovery(tmp_path) as stage:
        await stage.protected("web-1", "db-1")
        async with stage.asking() as asking:
            groups = [
                {"name": "one", "machines": [{"machine": "db-1"}], "after": [ACTION]},
                {"name": "two", "machines": [{"machine": "web-1"}]},
            ]
            await create_plan(
                asking.session, VAULT, document(groups=groups), who="ann", now_ns=asking.now_ns
            )
        yield stage


async def test_drills_by_hand(stage: RecoveryStage) -> None:
    await a_drill_of_a_plan_leaves_a_report_and_nothing_else(stage)
    await a_drill_that_fails_says_why_and_is_tidied_up(stage)


async def a_drill_of_a_plan_leaves_a_report_and_nothing_else(stage: RecoveryStage) -> None:
    keeper = keeper_of(stage, evidence_seconds=60)
    async with stage.asking("ann") as asking:
        request = RunRequest(notes="for the auditors")
        row, job = await begin_drill(asking, keeper.config, request, plan="small")
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).state == "succeeded"
    await keeper.look()
    # The screenshots have not come yet: they are waited for.
    assert (await reports(stage))[0].state == "running"
    async with stage.database.writing() as session:
        for vm in await session.scalars(select(RecoveredVm.id)):
            for kind, content in (
                (EvidenceKind.CONSOLE, b"booted\n"),
                (EvidenceKind.SCREENSHOT, base64.b64decode(png())),
            ):
                await take_evidence(session, COMPUTE, vm, kind, content, now_ns=stage.clock())
    done = await ended(stage, keeper, row.id)
    await stage.nothing_is_left()

    report = done.document
    assert is_untouched(report)
    assert (done.state, report["passed"], report["reason"]) == ("passed", True, "")
    assert [(one["machine"], one["group"]) for one in report["machines"]] == [
        ("db-1", 1),
        ("web-1", 2),
    ]
    for one in report["machines"]:
        assert (one["passed"], one["point"], one["consistency"]) == (True, "newest", "crash")
        assert 0 < one["rto_seconds"] <= report["rto_seconds"]
        assert one["screenshot"] == png()
        assert one["console"] == "booted\n"
    assert [one["state"] for one in report["actions"]] == ["done"]
    assert "tell: said" in report["actions"][0]["output"]
    assert report["cleanup"]["state"] == "succeeded"
    assert report["notes"] == "for the auditors"
    assert done.page.count("data:image/png;base64,") == 2
    async with stage.database.reading() as session:
        entry = await session.scalar(select(AuditEntry).where(AuditEntry.action == "drill.end"))
    assert entry is not None
    assert entry.detail["digest"] == report["digest"]


async def a_drill_that_fails_says_why_and_is_tidied_up(stage: RecoveryStage) -> None:
    stage.nodes.unwell["web-1-test"] = "no file system could be mounted"
    keeper = keeper_of(stage)
    async with stage.asking() as asking:
        row, job = await begin_drill(asking, keeper.config, RunRequest(), plan="small")
    await stage.protection.begin(job.id)
    done = await ended(stage, keeper, row.id)
    await stage.nothing_is_left()
    assert (done.state, done.document["rto_seconds"]) == ("failed", None)
    assert "web-1" in done.document["reason"]
    passed = {one["machine"]: one["passed"] for one in done.document["machines"]}
    assert passed["web-1"] is False
    assert "no file system could be mounted" in done.page


async def test_drills_are_held_when_due_and_missed_ones_once(stage: RecoveryStage) -> None:
    made = await schedule(stage, machine=MACHINE)
    keeper = keeper_of(stage)
    await keeper.look()
    assert await reports(stage) == []
    assert DAY_NS >= made.next_ns - stage.clock() > 0
    # No config server ran for five days: one drill is made up for.
    await missed(stage, 5)
    await keeper.look()
    await keeper.look()
    (row,) = await reports(stage)
    assert (row.schedule, row.target, row.asked_by) == ("nightly", "web-1", "schedule nightly")
    async with stage.database.reading() as session:
        now = await session.get_one(DrillSchedule, made.id)
    assert now.next_ns == next_at(DAILY.timing, now.last_ns)
    assert 0 < now.next_ns - stage.clock() <= DAY_NS
    assert (await ended(stage, keeper, row.id)).state == "passed"


async def test_the_next_drill_waits_for_the_one_that_is_on(stage: RecoveryStage) -> None:
    stage.nodes.stuck.add("web-1-test")
    await schedule(stage, machine=MACHINE)
    keeper = keeper_of(stage)
    for _ in range(3):
        await missed(stage, 1)
        await keeper.look()
    (row,) = await reports(stage)
    stage.nodes.stuck.clear()
    assert (await ended(stage, keeper, row.id)).state == "passed"
    await keeper.look()
    assert len(await reports(stage)) == 2


async def test_a_drill_that_waits_for_the_last_one_holds_up_no_other_schedule(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeping, "DUE_AT_ONCE_MAX", 1)
    stage.nodes.stuck.add("web-1-test")
    waiting = await schedule(stage, machine=MACHINE)
    keeper = keeper_of(stage)
    await missed(stage, 2)
    await keeper.look()
    (row,) = await reports(stage)
    await missed(stage, 1)  # due again, and the first in the order of time
    await schedule(stage, "other", machine=OTHER)
    await missed(stage, 1)
    await keeper.look()
    assert [each.schedule for each in await reports(stage)] == ["nightly", "other"]
    # Also while it is being cleaned up, and for who had seen it due before it was begun.
    for state in ("cleaning-up", "running"):
        await has_state(stage, row.id, state)
        await keeper._hold(waiting.id)
        assert len(await reports(stage)) == 2
        async with stage.database.reading() as session:
            assert (await session.get_one(DrillSchedule, waiting.id)).next_ns < stage.clock()
    stage.nodes.stuck.clear()
    assert (await ended(stage, keeper, row.id)).state == "passed"
    await keeper.look()
    assert [each.schedule for each in await reports(stage)][2:] == ["nightly"]


async def has_state(stage: RecoveryStage, drill: uuid.UUID, state: str) -> None:
    async with stage.database.writing() as session:
        (await find_drill(session, drill)).state = state


async def test_one_config_server_of_two_holds_drills(stage: RecoveryStage) -> None:
    await schedule(stage, machine=MACHINE)
    one, two = keeper_of(stage, "one"), keeper_of(stage, "two")
    await one.look()
    await missed(stage, 1)
    await asyncio.gather(two.look(), two.look())
    assert await reports(stage) == []
    await lease_runs_out(stage)
    await asyncio.gather(two.look(), one.look(), two.look(), one.look())
    (row,) = await reports(stage)
    await lease_runs_out(stage)
    assert (await ended(stage, one, row.id)).state == "passed"


async def test_a_drill_that_cannot_begin_is_evidence_too(stage: RecoveryStage) -> None:
    await schedule(stage, plan="small")
    with pytest.raises(ConflictError, match="drills of plan small are scheduled: nightly"):
        async with stage.asking() as asking:
            await delete_plan(asking.session, "small")
    stage.nodes.silent.add(COMPUTE)
    async with asyncio.timeout(WAIT_SECONDS):
        while COMPUTE in stage.nodes.reports:
            stage.nodes.reports.pop(COMPUTE)
            await asyncio.sleep(0.05)
    await missed(stage, 1)
    await keeper_of(stage).look()
    (row,) = await reports(stage)
    assert row.state == "failed"
    assert "compute" in row.document["reason"]
    assert is_untouched(row.document)
    assert "Failed" in row.page
    (told,) = (await FactReader(stage.database, lambda _: None).read(stage.clock())).work
    assert isinstance(told, ScheduleFacts)
    assert (told.name, told.target, told.failed) == ("nightly", "small", row.document["reason"])
    async with stage.asking() as asking:
        await delete_schedule(asking.session, "nightly")
        await delete_plan(asking.session, "small")
    await the_oldest_reports_go_beyond_so_many(stage)
    await a_row_that_cannot_be_read_holds_up_no_other(stage)


async def the_oldest_reports_go_beyond_so_many(stage: RecoveryStage) -> None:
    async with stage.database.writing() as session:
        for number in range(5):
            session.add(
                DrillReport(
                    id=uuid.UUID(int=number),
                    target="x",
                    state="passed",
                    asked_by="ann",
                    began_ns=number,
                    document={},
                )
            )
    await keeper_of(stage, drill_count_max=2).look()
    kept = await reports(stage)
    assert (len(kept), kept[0].began_ns) == (2, 4)


async def a_row_that_cannot_be_read_holds_up_no_other(stage: RecoveryStage) -> None:
    await schedule(stage, "broken", machine=MACHINE)
    async with stage.database.writing() as session:
        for row in await session.scalars(select(DrillSchedule)):
            row.document, row.next_ns = {"timing": {}}, 0
    await schedule(stage, "good", machine=MACHINE)
    await missed(stage, 1)
    (told,) = await keeper_of(stage).look()
    assert "its row cannot be read" in str(told)
    assert "good" in [row.schedule for row in await reports(stage)]


async def test_a_defect_of_one_schedule_is_evidence_and_holds_up_nothing(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object, **__: object) -> None:
        raise OverflowError

    monkeypatch.setattr(keeping, "begin_drill", broken)
    made = await schedule(stage, machine=MACHINE)
    await missed(stage, 2)
    assert await keeper_of(stage).look() == ()
    (report,) = await reports(stage)
    assert (report.state, report.document["passed"]) == ("failed", False)
    assert "a defect" in report.document["reason"]
    async with stage.database.reading() as session:
        found = await _outcomes(session, [report])
    assert found[report.id] == {"rto_seconds": None, "reason": report.document["reason"]}
    async with stage.database.reading() as session:
        assert (await session.get_one(DrillSchedule, made.id)).next_ns > stage.clock()


async def test_a_drill_whose_evidence_cannot_be_read_is_tidied_up_and_has_not_passed(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise OverflowError

    monkeypatch.setattr(keeping, "gather", broken)
    keeper = keeper_of(stage, evidence_seconds=60)
    async with stage.asking() as asking:
        request = RunRequest(notes="for the auditors")
        row, job = await begin_drill(asking, keeper.config, request, plan="small")
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).state == "succeeded"
    (trouble,) = await keeper.look()
    assert str(row.id) in trouble.what
    assert (await reports(stage))[0].state == "running"
    done = await ended(stage, keeper_of(stage), row.id)
    await stage.nothing_is_left()
    assert is_untouched(done.document)
    assert (done.state, done.document["passed"]) == ("failed", False)
    assert "OverflowError" in done.document["reason"]
    assert done.document["notes"] == "for the auditors"
    assert done.document["cleanup"]["state"] == "succeeded"

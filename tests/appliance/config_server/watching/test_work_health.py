"""Drills that are scheduled, and jobs that have left something: from rows to events."""

import time
import uuid
from typing import Any

import pytest
from sqlalchemy import delete

from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.recovery_tables import DrillReport, DrillSchedule
from appliance.config_server.store.schema import Job
from appliance.config_server.watching.reason import Code, Severity
from appliance.config_server.watching.work_health import LeftFacts, ScheduleFacts, work_health
from tests.appliance.config_server.watching.scene import MACHINE, NS, set_scene
from tests.appliance.config_server.watching.test_watcher import Clock, Rig

HOUR_NS = 3600 * NS
NOW_NS = 1000 * 24 * HOUR_NS
SCHEDULE = uuid.UUID(int=70)


def facts(**of: Any) -> ScheduleFacts:
    return ScheduleFacts(SCHEDULE, "nightly", "shop", **of)


@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (facts(), []),
        (facts(due_ns=NOW_NS + HOUR_NS), []),
        (facts(due_ns=NOW_NS - HOUR_NS), []),
        (facts(due_ns=NOW_NS - HOUR_NS - 1), [(Code.DRILL_LATE, Severity.WARNING)]),
        (facts(due_ns=NOW_NS - 25 * HOUR_NS), [(Code.DRILL_LATE, Severity.CRITICAL)]),
        (facts(failed="no room"), [(Code.DRILL_FAILED, Severity.CRITICAL)]),
        (
            facts(failed="no room", due_ns=NOW_NS - 2 * HOUR_NS, is_on=True),
            [(Code.DRILL_FAILED, Severity.CRITICAL), (Code.DRILL_LATE, Severity.WARNING)],
        ),
    ],
)
def test_a_schedule_is_well_while_its_drills_pass_in_time(
    schedule: ScheduleFacts, found: list[tuple[Code, Severity]]
) -> None:
    health = work_health(schedule, NOW_NS)
    assert [(reason.code, reason.severity) for reason in health.reasons] == found
    assert all("shop" in reason.message for reason in health.reasons)
    if schedule.is_on:
        assert "waits for a person" in health.reasons[1].cause


def test_a_job_that_left_something_says_what_to_do() -> None:
    left = LeftFacts(SCHEDULE, "web-1", "00ab", "web-1 is cancelling", "switch the source on")
    (reason,) = work_health(left, NOW_NS).reasons
    assert (reason.code, reason.severity) == (Code.JOB_NOT_UNDONE, Severity.CRITICAL)
    assert reason.message == "job 00ab: web-1 is cancelling"
    assert reason.action == "switch the source on"


@pytest.fixture
async def rig(database_url: str) -> Any:
    async with open_database(database_url) as database:
        clock = Clock(time.time_ns())
        await set_scene(database, clock())
        yield Rig(database, clock)


async def drill(database: Database, state: str, began_ns: int, reason: str = "") -> None:
    async with database.writing() as session:
        session.add(
            DrillReport(
                id=uuid.uuid4(),
                schedule="nightly",
                target="shop",
                state=state,
                asked_by="schedule nightly",
                began_ns=began_ns,
                document={"reason": reason, "screenshot": "x" * 100_000},
            )
        )


async def scheduled(rig: Rig) -> None:
    now_ns = rig.clock()
    async with rig.database.writing() as session:
        session.add(
            DrillSchedule(
                id=uuid.uuid4(),
                name="nightly",
                plan="shop",
                document={},
                next_ns=now_ns + 24 * HOUR_NS,
                created_by="ann",
                created_ns=now_ns,
            )
        )


async def unscheduled(rig: Rig) -> None:
    async with rig.database.writing() as session:
        await session.execute(delete(DrillSchedule))


async def test_an_event_of_a_drill_ends_when_one_passes_or_the_schedule_goes(rig: Rig) -> None:
    failed = ("nightly", "drill-failed", "critical")
    await drill(rig.database, "failed", rig.clock() - 1, "of an older schedule of this name")
    await scheduled(rig)
    await rig.look_for(30)
    assert await rig.events() == []
    await drill(rig.database, "failed", rig.clock(), "web-1: no file system could be mounted")
    await rig.look_for(30)
    assert await rig.events() == [(*failed, True)]
    # The next one is on, and has passed when it has passed; by hand is not by schedule.
    await drill(rig.database, "running", rig.clock())
    await rig.look_for(70)
    assert await rig.events() == [(*failed, True)]
    await drill(rig.database, "passed", rig.clock())
    await rig.look_for(70)
    assert await rig.events() == [(*failed, False)]
    await drill(rig.database, "failed", rig.clock(), "again")
    await rig.look_for(30)
    assert await rig.events() == [(*failed, False), (*failed, True)]
    await unscheduled(rig)
    await rig.look_for(70)
    assert await rig.events() == [(*failed, False), (*failed, False)]


async def test_a_job_that_left_something_is_an_event_until_something_newer_is_asked(
    rig: Rig,
) -> None:
    await left(rig, "001", "failed", {"code": "not_undone", "message": "m", "hint": "do so"})
    await left(rig, "000", "succeeded", None)
    await rig.look_for(30)
    assert ("db-01", "job-not-undone", "critical", True) in await rig.events()
    (work,) = rig.watcher.assessment.work.values()
    assert work.health.reasons[0].action == "do so"
    await left(rig, "002", "running", None)
    await rig.look_for(70)
    assert ("db-01", "job-not-undone", "critical", False) in await rig.events()


async def left(rig: Rig, job: str, state: str, error: dict[str, str] | None) -> None:
    async with rig.database.writing() as session:
        session.add(
            Job(
                id=job,
                kind="cancel-failover",
                target_id=MACHINE,
                target="db-01",
                state=state,
                request={},
                steps=[],
                error=error,
                asked_by="ann",
                created_ns=rig.clock(),
                updated_ns=rig.clock(),
            )
        )

"""Failovers and test failovers of one machine, from the request to nothing being left."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.config_server.recovery.follow_up import cancel, change_point, commit
from appliance.config_server.recovery.requests import clean_up
from appliance.config_server.recovery.run import FailoverKind
from tests.appliance.config_server.protection.stage import MACHINE
from tests.appliance.config_server.recovery.stage import VMS, RecoveryStage, open_recovery

TEST, PLANNED, UNPLANNED = FailoverKind.TEST, FailoverKind.PLANNED, FailoverKind.UNPLANNED


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[RecoveryStage]:
    async with open_recovery(tmp_path) as opened:
        await opened.protected()
        yield opened


async def test_a_test_failover_changes_nothing_and_leaves_nothing(stage: RecoveryStage) -> None:
    failover = await stage.failed_over(TEST)
    assert (failover.state, failover.point, failover.job_id) == ("up", "newest", None)
    assert failover.network.startswith("test-")
    assert (await stage.machine()).state == "protected"
    assert await stage.there() == (["web-1-test"], ["latest"])
    async with stage.asking() as asking:
        job = await clean_up(asking, failover.id, notes="all well")
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).state == "succeeded"
    assert await stage.there() == ([], [])
    (failover,) = await stage.failovers(job)
    assert (failover.state, failover.notes) == ("cleaned-up", "all well")
    assert failover.ended_ns


async def test_a_planned_failover_is_of_the_last_changeset_and_can_be_taken_back(
    stage: RecoveryStage,
) -> None:
    failover = await stage.failed_over(PLANNED)
    assert failover.point == "final"
    assert stage.power.off == [VMS[MACHINE]]
    machine = await stage.machine()
    assert (machine.state, machine.job_id, machine.final_wanted) == ("failed-over", None, False)
    async with stage.asking() as asking:
        job = await cancel(asking, failover.id)
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).state == "succeeded"
    assert (await stage.machine()).state == "protected"
    assert await stage.there() == ([], [])


async def test_an_unplanned_failover_gets_another_point_and_is_committed(
    stage: RecoveryStage,
) -> None:
    stage.power.refuses = "the vCenter burns"
    failover = await stage.failed_over(UNPLANNED)
    assert (failover.state, failover.point) == ("up", "newest")
    assert "the vCenter burns" in failover.notes
    first = failover.vm_id
    async with stage.asking() as asking:
        job = await change_point(asking, failover.id, "old")
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).error is None
    (failover,) = await stage.failovers(job)
    assert (failover.point, failover.state) == ("old", "up")
    assert failover.vm_id != first
    assert await stage.there() == (["web-1"], ["old"])
    async with stage.asking() as asking:
        job = await commit(asking, failover.id)
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).error is None
    assert (await stage.machine()).state == "committed"
    assert await stage.there() == (["web-1"], [])

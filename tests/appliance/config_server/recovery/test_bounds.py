"""No wait of a failover is without end, and each says how long it lasts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.jobs import find_job, steps_of
from appliance.config_server.recovery import afterwards, decisions, switching_off
from appliance.config_server.recovery.actions import runner
from appliance.config_server.recovery.actions.runner import ActionRunner
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.recovery.follow_up import commit
from appliance.config_server.recovery.parts import PERHAPS_OFF
from appliance.config_server.recovery.run import FailoverKind
from appliance.config_server.store.schema import Job
from tests.appliance.config_server.protection.stage import JOBS
from tests.appliance.config_server.recovery.actions.orders import VAULT, script
from tests.appliance.config_server.recovery.stage import COMPUTE, RecoveryStage, open_recovery

PLANNED, UNPLANNED = FailoverKind.PLANNED, FailoverKind.UNPLANNED


async def committed(stage: RecoveryStage, failover: Any) -> Job:
    async with stage.asking() as asking:
        job = await commit(asking, failover.id)
    await stage.protection.begin(job.id)
    return await stage.ended(job.id)


async def test_a_commit_waits_for_its_compute_node_no_longer_than_for_any_answer(
    tmp_path: Path,
) -> None:
    config = JobsConfig(**{**JOBS.model_dump(), "answer_seconds_max": 2})
    async with open_recovery(tmp_path, jobs=config) as stage:
        await stage.protected()
        failover = await stage.failed_over(UNPLANNED)
        stage.nodes.silent.add(COMPUTE)
        job = await committed(stage, failover)
        assert job.error is not None
        assert (job.error["code"], "was not heard" in job.error["message"]) == ("no_answer", True)
        machine = await stage.machine()
        assert (machine.state, machine.job_id) == ("failed-over", None)
        stage.nodes.silent.clear()
        assert (await committed(stage, failover)).error is None
        assert (await stage.machine()).state == "committed"


async def test_a_copy_of_disks_that_stands_still_fails_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decisions, "COPY_STILL_SECONDS_MAX", 1)
    monkeypatch.setattr(afterwards, "_MARK_NS", 0)
    async with open_recovery(tmp_path) as stage:
        await stage.protected()
        failover = await stage.failed_over(UNPLANNED)
        stage.nodes.stubborn.add(COMPUTE)
        job = await committed(stage, failover)
        assert job.error is not None
        assert (job.error["code"], "at 0%" in job.error["message"]) == ("no_progress", True)
        assert (await stage.machine()).state == "failed-over"
        assert "within 1 s" in steps_of(job)[0].note


async def test_a_source_whose_turn_comes_too_late_is_left_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last one of very many: its agent has thawed, and to cut its power is of no use."""
    source_of = switching_off._source_of
    monkeypatch.setattr(
        switching_off, "_source_of", lambda part: replace(source_of(part), until_ns=0)
    )
    async with open_recovery(tmp_path) as stage:
        await stage.protected()
        job = await stage.ended((await stage.begun(PLANNED)).id)
        assert job.error is not None
        assert job.error["code"] == "not_off"
        assert "lets writes go on after 300 s" in job.error["message"]
        assert stage.power.off == []
        (failover,) = await stage.failovers(job)
        assert PERHAPS_OFF not in failover.notes
        assert failover.power_off_ns == 0
        await stage.nothing_is_left()


async def test_each_wait_says_how_long_it_is(tmp_path: Path) -> None:
    async with open_recovery(tmp_path) as stage:
        await stage.protected()
        stage.nodes.stuck.add("web-1")
        stage.nodes.stubborn.add(COMPUTE)
        job = await stage.begun(UNPLANNED)
        assert await stage.noted(job.id, 2) == (
            "waits for the compute node to make the disks, 20 s at most"
        )
        stage.nodes.stubborn.clear()
        assert "it has 360 s in all" in await stage.noted(job.id, 4)
        async with stage.database.writing() as session:
            (await find_job(session, job.id, lock=True)).cancel_asked = True
        stage.protection.performer.wake(job.id)
        assert (await stage.ended(job.id)).state == "cancelled"


async def test_an_action_waits_for_its_turn_no_longer_than_so_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "TURN_SECONDS_MAX", 0.05)
    one = ActionRunner(RecoveryConfig(actions_at_once=1), VAULT)
    async with one._turn:
        outcome = await one.run(script({"command": "true"}))
    assert not outcome.succeeded
    assert "it was not begun within" in outcome.detail
    assert not one._turn.locked()

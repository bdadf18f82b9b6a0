"""Failovers whose job cannot undo what it began: let go of, and people can go on with them."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from appliance.config_server.protection import ending
from appliance.config_server.protection.jobs import NOT_UNDONE, ask_to_cancel, find_job
from appliance.config_server.recovery import afterwards, workflows
from appliance.config_server.recovery import part as looking
from appliance.config_server.recovery.follow_up import cancel, change_point, commit
from appliance.config_server.recovery.parts import PERHAPS_OFF
from appliance.config_server.recovery.requests import begin_run, clean_up
from appliance.config_server.recovery.run import (
    ActionKind,
    FailoverKind,
    RunAction,
    RunGroup,
    RunMachine,
    RunPlan,
)
from appliance.config_server.recovery.settling import settle_one
from appliance.config_server.store.recovery_tables import Failover, PlanAction, PlanRun
from appliance.config_server.store.schema import Job
from daemon.service import Health
from tests.appliance.config_server.protection.stage import MACHINE
from tests.appliance.config_server.recovery.stage import COMPUTE, RecoveryStage, open_recovery

TEST, PLANNED, UNPLANNED = FailoverKind.TEST, FailoverKind.PLANNED, FailoverKind.UNPLANNED


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RecoveryStage]:
    monkeypatch.setattr(ending, "ENDING_TRIES_MAX", 2)
    monkeypatch.setattr(ending, "ENDING_RETRY_SECONDS", 0.01)
    async with open_recovery(tmp_path) as opened:
        await opened.protected()
        yield opened


def broken(*_: object, **__: object) -> None:
    raise RuntimeError("no such column")


async def cancelled(stage: RecoveryStage, job: Job) -> Job:
    async with stage.database.writing() as session:
        ask_to_cancel(await find_job(session, job.id, lock=True), stage.clock())
    stage.protection.performer.wake(job.id)
    return await stage.ended(job.id)


def not_undone(job: Job, *told: str) -> None:
    assert (job.state, job.ended_ns is not None) == ("failed", True)
    assert job.error is not None
    assert job.error["code"] == NOT_UNDONE
    assert "no such column" in job.error["message"]
    for each in told:
        assert each in job.error["message"] + job.error["hint"]


async def asked(stage: RecoveryStage, ask: Any, *options: Any) -> Job:
    async with stage.asking() as asking:
        job: Job = await ask(asking, *options)
    await stage.protection.begin(job.id)
    return await stage.ended(job.id)


async def test_a_failover_that_cannot_be_taken_back_is_on_its_way_back(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.nodes.stuck.add("web-1")
    job = await stage.begun(PLANNED)
    await stage.noted(job.id, 5)
    with monkeypatch.context() as patch:
        patch.setattr(workflows, "take_back", broken)
        job = await cancelled(stage, job)
    not_undone(job, "web-1 is cancelling", "understudy failover cancel web-1", "switched off")
    machine = await stage.machine()
    assert (machine.state, machine.job_id, machine.final_wanted) == ("cancelling", None, False)
    (failover,) = await stage.failovers(job)
    assert (failover.state, failover.job_id) == ("cancelling", None)
    assert PERHAPS_OFF in failover.notes
    async with stage.database.reading() as session:
        assert (await session.scalars(select(PlanRun.ended_ns))).all() != [None]
    # By hand, without the round that every config server makes: it can be asked for again.
    assert (await asked(stage, cancel, failover.id)).error is None
    assert (await stage.machine()).state == "protected"
    await stage.nothing_is_left()
    stage.nodes.stuck.clear()
    assert (await stage.failed_over(UNPLANNED)).state == "up"


async def test_what_is_abandoned_goes_by_itself(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.nodes.stuck |= {"web-1", "web-1-test"}
    for kind, state in ((UNPLANNED, "cancelling"), (TEST, "cleaning-up")):
        job = await stage.begun(kind)
        await stage.noted(job.id, 4 if kind is UNPLANNED else 3)
        with monkeypatch.context() as patch:
            patch.setattr(workflows, "take_back", broken)
            job = await cancelled(stage, job)
        not_undone(job, f"web-1 is {state}")
        await stage.nothing_is_left()
        machine = await stage.machine_is(MACHINE, "protected")
        assert machine.job_id is None


async def test_what_is_up_stays_when_a_run_that_failed_cannot_be_ended(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.actions.fails["announce"] = "exit code 1"
    announce = RunAction(name="announce", kind=ActionKind.SCRIPT)
    group = RunGroup(machines=(RunMachine(id=MACHINE),), after=(announce,))
    with monkeypatch.context() as patch:
        patch.setattr(workflows, "fail_over", broken)
        job = await asked(stage, begin_run, UNPLANNED, RunPlan(plan="shop", groups=(group,)))
    not_undone(job, "exit code 1", "web-1 is up", "understudy failover show web-1")
    machine = await stage.machine()
    assert (machine.state, machine.job_id) == ("failed-over", None)
    async with stage.database.reading() as session:
        assert {row.state for row in await session.scalars(select(PlanAction))} == {"failed"}
    (failover,) = await stage.failovers(job)
    assert (failover.state, failover.error) == ("up", None)
    await a_point_that_cannot_be_changed_back_is_left_and_the_old_vm_runs(stage, monkeypatch)
    await a_commit_that_cannot_be_ended_leaves_it_failed_over(stage, monkeypatch)
    await what_was_taken_back_but_cannot_be_ended_goes_by_itself(stage, monkeypatch)


async def a_point_that_cannot_be_changed_back_is_left_and_the_old_vm_runs(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.nodes.unwell["web-1"] = "no file system could be mounted"
    failover = await newest(stage)
    with monkeypatch.context() as patch:
        patch.setattr(afterwards, "unchanged", broken)
        job = await asked(stage, change_point, failover.id, "old")
    not_undone(job, "no file system could be mounted", "web-1 is up")
    stage.nodes.unwell.clear()
    machine = await stage.machine()
    assert (machine.state, machine.job_id) == ("failed-over", None)
    await stage.left(["latest"])
    now = await newest(stage)
    assert (now.vm_id, now.next_vm_id, now.state) == (failover.vm_id, None, "up")


async def a_commit_that_cannot_be_ended_leaves_it_failed_over(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    failover = await newest(stage)
    with monkeypatch.context() as patch:
        patch.setattr(afterwards, "release", broken)
        job = await asked(stage, commit, failover.id)
    not_undone(job, "all steps are done", "web-1 is up")
    assert ((await stage.machine()).state, (await stage.machine()).job_id) == ("failed-over", None)


async def what_was_taken_back_but_cannot_be_ended_goes_by_itself(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    failover = await newest(stage)
    with monkeypatch.context() as patch:
        patch.setattr(afterwards, "release", broken)
        job = await asked(stage, cancel, failover.id)
    not_undone(job, "web-1 is cancelling")
    assert (await stage.machine_is(MACHINE, "protected")).job_id is None
    await stage.nothing_is_left()


async def test_a_cleanup_that_cannot_be_ended_goes_by_itself(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    failover = await stage.failed_over(TEST)
    with monkeypatch.context() as patch:
        patch.setattr(afterwards, "end", broken)
        job = await asked(stage, clean_up, failover.id)
    assert job.error is not None
    assert job.error["code"] == "defect"
    await stage.recovery.look()
    await stage.nothing_is_left()
    now = await newest(stage)
    assert now.state == "cleaned-up"


async def test_a_failover_that_cannot_be_looked_after_holds_up_no_other(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.nodes.stuck.add("web-1-test")
    jobs = [await stage.begun(TEST, point) for point in ("old", "newest")]
    for job in jobs:
        await stage.noted(job.id, 3)
    stage.nodes.stubborn.add(COMPUTE)
    for job in jobs:
        await cancelled(stage, job)
    bad = (await stage.failovers(jobs[0]))[0].id

    async def settle_all_but_one(session: Any, failover: Any, *rest: Any) -> Any:
        if failover == bad:
            broken()
        return await settle_one(session, failover, *rest)

    monkeypatch.setattr(looking, "settle_one", settle_all_but_one)
    stage.nodes.stubborn.clear()
    health = Health()
    looks = asyncio.create_task(stage.recovery.run(health))
    await stage.left(["old"])
    assert f"failover {bad}: a defect: RuntimeError" in health.criticals["recovery"]
    assert not looks.done()
    monkeypatch.undo()
    await stage.nothing_is_left()
    looks.cancel()
    await asyncio.gather(looks, return_exceptions=True)


async def newest(stage: RecoveryStage) -> Failover:
    async with stage.database.reading() as session:
        found = await session.scalars(select(Failover).order_by(Failover.asked_ns.desc()))
        return found.first() or pytest.fail("there is no failover")

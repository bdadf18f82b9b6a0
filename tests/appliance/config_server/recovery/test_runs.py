"""Runs of several machines and their actions: order, failures, people, cancellation."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select

from appliance.config_server.protection.jobs import ask_to_cancel, find_job, steps_of
from appliance.config_server.recovery.requests import begin_run, clean_up_run, resume
from appliance.config_server.recovery.run import (
    ActionKind,
    FailoverKind,
    OnFailure,
    RunAction,
    RunGroup,
    RunMachine,
    RunPlan,
)
from appliance.config_server.store.recovery_tables import PlanAction
from appliance.config_server.store.schema import Job
from replication.errors import ConflictError, InputError
from tests.appliance.config_server.protection.stage import MACHINE, WAIT_SECONDS
from tests.appliance.config_server.recovery.stage import (
    OTHER,
    VMS,
    RecoveryStage,
    open_recovery,
)

TEST, PLANNED, UNPLANNED = FailoverKind.TEST, FailoverKind.PLANNED, FailoverKind.UNPLANNED


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[RecoveryStage]:
    async with open_recovery(tmp_path) as opened:
        await opened.protected("web-1", "db-1")
        yield opened


def script(name: str, on_failure: OnFailure = OnFailure.STOP) -> RunAction:
    return RunAction(name=name, kind=ActionKind.SCRIPT, on_failure=on_failure)


def group(
    *machines: uuid.UUID,
    before: tuple[RunAction, ...] = (),
    after: tuple[RunAction, ...] = (),
) -> RunGroup:
    return RunGroup(
        machines=tuple(RunMachine(id=machine) for machine in machines), before=before, after=after
    )


async def begun(
    stage: RecoveryStage,
    kind: FailoverKind,
    *groups: RunGroup,
    on_failure: OnFailure = OnFailure.STOP,
) -> Job:
    plan = RunPlan(plan="shop", groups=groups, on_failure=on_failure)
    async with stage.asking() as asking:
        job = await begin_run(asking, kind, plan)
    await stage.protection.begin(job.id)
    return job


async def states(stage: RecoveryStage, job: Job) -> dict[str, str]:
    return {row.machine: row.state for row in await stage.failovers(job)}


async def test_groups_and_actions_are_done_in_their_order(stage: RecoveryStage) -> None:
    manual = RunAction(name="look", kind=ActionKind.MANUAL, spec={"instruction": "is it green?"})
    job = await begun(
        stage,
        TEST,
        group(OTHER, before=(script("stop cron"),)),
        group(MACHINE, after=(manual, script("announce"))),
    )
    assert [step.name for step in steps_of(job)] == [
        "hold the points",
        "make the disks",
        "group 1: before 1: stop cron",
        "group 1: start",
        "group 1: check",
        "group 2: start",
        "group 2: check",
        "group 2: after 1: look",
        "group 2: after 2: announce",
    ]
    note = await stage.noted(job.id, 7)
    assert "is it green?" in note
    assert [order.name for order in stage.actions.orders] == ["stop cron"]
    assert [(vm.name, vm.state, vm.group) for vm in stage.actions.orders[0].vms] == [
        ("db-1", "starting", 1),
        ("web-1", "starting", 2),
    ]
    async with stage.asking("bob") as asking:
        await resume(asking, job.id, note="it is")
    stage.protection.performer.wake(job.id)
    job = await stage.ended(job.id)
    assert job.error is None
    assert steps_of(job)[7].note == "resumed by bob: it is"
    assert stage.actions.orders[1].vms[1].address == "10.0.0.2"
    with pytest.raises(ConflictError, match="does not wait"):
        async with stage.asking() as asking:
            await resume(asking, job.id)
    async with stage.asking() as asking:
        job = await clean_up_run(asking, uuid.UUID(job.request["run"]), notes="well done")
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).error is None
    assert await states(stage, job) == {"web-1": "cleaned-up", "db-1": "cleaned-up"}
    assert await stage.there() == ([], [])


async def test_a_failed_machine_stops_the_run_and_what_is_up_stays(stage: RecoveryStage) -> None:
    stage.nodes.unwell["web-1"] = "/dev/vda1 is not clean"
    job = await begun(stage, UNPLANNED, group(OTHER), group(MACHINE))
    job = await stage.ended(job.id)
    assert job.error is not None
    assert job.error["code"] == "check_failed"
    assert job.error["message"].startswith("web-1: ")
    assert await states(stage, job) == {"db-1": "up", "web-1": "failed"}
    await stage.machine_is(MACHINE, "protected")
    await stage.machine_is(OTHER, "failed-over")
    async with asyncio.timeout(WAIT_SECONDS):
        while await stage.there() != (["db-1"], ["latest"]):
            await stage.recovery.look()


async def test_a_run_may_go_on_without_those_that_fail(stage: RecoveryStage) -> None:
    stage.nodes.broken["db-1"] = "no room"
    fragile = script("fragile", OnFailure.CONTINUE)
    stage.actions.fails["fragile"] = "exit code 3"
    job = await begun(
        stage,
        PLANNED,
        group(OTHER, after=(fragile,)),
        group(MACHINE),
        on_failure=OnFailure.CONTINUE,
    )
    job = await stage.ended(job.id)
    assert job.error is not None
    assert job.error["code"] == "partly_failed"
    assert await states(stage, job) == {"db-1": "failed", "web-1": "up"}
    db = await stage.machine_is(OTHER, "protected")
    assert (db.job_id, db.final_wanted) == (None, False)
    assert sorted(stage.power.off) == sorted(VMS.values())
    notes = {row.machine: row.notes for row in await stage.failovers(job)}
    assert "switch it on again" in notes["db-1"]
    assert any("gone on" in step.note for step in steps_of(job))
    async with stage.database.reading() as session:
        (row,) = await session.scalars(select(PlanAction))
    assert (row.state, row.exit_code, row.output) == ("failed", 1, "fragile: said\\0 something")


async def test_a_failed_action_stops_the_run(stage: RecoveryStage) -> None:
    stage.actions.fails["stop cron"] = "exit code 1"
    job = await begun(stage, TEST, group(OTHER, MACHINE, before=(script("stop cron"),)))
    job = await stage.ended(job.id)
    assert job.error is not None
    assert (job.error["code"], "exit code 1" in job.error["message"]) == ("action_failed", True)
    assert await states(stage, job) == {"db-1": "failed", "web-1": "failed"}
    await stage.nothing_is_left()


async def test_a_cancelled_run_ends_its_action_and_takes_everything_back(
    stage: RecoveryStage,
) -> None:
    stage.actions.endless.add("wait for ever")
    job = await begun(stage, UNPLANNED, group(OTHER, MACHINE, after=(script("wait for ever"),)))
    async with asyncio.timeout(WAIT_SECONDS):
        await stage.actions.begun.wait()
    assert await states(stage, job) == {"db-1": "up", "web-1": "up"}
    async with stage.database.writing() as session:
        ask_to_cancel(await find_job(session, job.id, lock=True), stage.clock())
    stage.protection.performer.wake(job.id)
    job = await stage.ended(job.id)
    assert (job.state, job.error) == ("cancelled", None)
    assert stage.actions.cancelled == ["wait for ever"]
    assert await states(stage, job) == {"db-1": "cancelled", "web-1": "cancelled"}
    for machine in (MACHINE, OTHER):
        assert (await stage.machine_is(machine, "protected")).job_id is None
    await stage.nothing_is_left()
    async with stage.database.reading() as session:
        assert [row.state for row in await session.scalars(select(PlanAction))] == ["cancelled"]


async def test_a_plan_that_makes_no_sense_begins_nothing(stage: RecoveryStage) -> None:
    with pytest.raises(InputError, match="no machines"):
        await begun(stage, TEST, group(before=(script("alone"),)))
    with pytest.raises(InputError, match="twice"):
        await begun(stage, TEST, group(MACHINE), group(MACHINE))
    with pytest.raises(ConflictError, match="not protected"):
        await begun(stage, TEST, group(uuid.uuid4()))
    async with stage.database.reading() as session:
        assert {job.kind for job in await session.scalars(select(Job))} == {"protect"}

"""Planned failovers: the last changeset, and the source that is switched off."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.config_server.protection.jobs import ask_to_cancel, find_job
from appliance.config_server.recovery import failing_over, switching_off
from appliance.config_server.recovery.parts import PERHAPS_OFF
from appliance.config_server.recovery.run import FailoverKind
from appliance.config_server.store.schema import Job
from tests.appliance.config_server.protection.stage import MACHINE, WAIT_SECONDS
from tests.appliance.config_server.recovery.stage import VMS, RecoveryStage, open_recovery

PLANNED, UNPLANNED = FailoverKind.PLANNED, FailoverKind.UNPLANNED


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[RecoveryStage]:
    async with open_recovery(tmp_path) as opened:
        await opened.protected()
        yield opened


async def test_a_source_that_wrote_on_before_it_was_off_fails_the_planned_failover(
    stage: RecoveryStage,
) -> None:
    async def thaw(vm: uuid.UUID) -> None:
        stage.nodes.frozen_not = "it was frozen for too long"
        await stage.nodes.report()
        assert stage.power.off == [vm]

    stage.power.then = thaw
    job = await stage.begun(PLANNED)
    told = await stage.failed(job, "not_off")
    assert "had let writes go on" in told


async def test_a_planned_failover_that_is_cancelled_lets_the_source_go_on(
    stage: RecoveryStage,
) -> None:
    stage.nodes.silent.add(MACHINE)
    job = await stage.begun(PLANNED)
    assert "final changeset" in await stage.noted(job.id, 0)
    assert (await stage.machine()).final_wanted
    async with stage.database.writing() as session:
        ask_to_cancel(await find_job(session, job.id, lock=True), stage.clock())
    stage.protection.performer.wake(job.id)
    job = await stage.ended(job.id)
    assert (job.state, job.error) == ("cancelled", None)
    machine = await stage.machine()
    assert (machine.state, machine.job_id, machine.final_wanted) == ("protected", None, False)
    assert stage.power.off == []
    assert await stage.there() == ([], [])


async def test_a_planned_failover_waits_for_repairs_before_anything_is_frozen(
    stage: RecoveryStage,
) -> None:
    stage.nodes.open_repairs = 2
    await stage.nodes.report()
    job = await stage.begun(PLANNED)
    assert "2 runs of blocks are wrong" in await stage.noted(job.id, 0)
    assert not (await stage.machine()).final_wanted
    stage.nodes.silent.add(MACHINE)
    await ordered_and_found_wrong(stage, job)
    stage.nodes.open_repairs = 0
    await stage.nodes.report()
    assert (await stage.ended(job.id)).state == "succeeded"
    assert stage.power.off == [VMS[MACHINE]]


async def test_what_the_last_changeset_does_not_mend_fails_the_failover_with_the_source_on(
    stage: RecoveryStage,
) -> None:
    stage.nodes.silent.add(MACHINE)
    job = await stage.begun(PLANNED)
    await ordered_and_found_wrong(stage, job)
    stage.nodes.applied = 10
    await stage.nodes.report()
    await stage.failed(job, "not_whole")
    assert stage.power.off == []
    assert not (await stage.machine()).final_wanted


async def test_what_is_known_to_be_wrong_does_not_keep_an_unplanned_failover_but_is_noted(
    stage: RecoveryStage,
) -> None:
    stage.nodes.open_repairs = 3
    await stage.nodes.report()
    failover = await stage.failed_over(UNPLANNED)
    assert failover.state == "up"
    assert failing_over.KNOWN_WRONG.format(3) in failover.notes


async def ordered_and_found_wrong(stage: RecoveryStage, job: Job) -> None:
    """Its agent, which is silent, tells of a last changeset in which something was found."""
    stage.nodes.open_repairs = 0
    await stage.nodes.report()
    await stage.machine_when(lambda machine: machine.final_wanted)
    stage.nodes.open_repairs = 1
    await stage.nodes.report()
    stage.nodes.silent.clear()
    async with asyncio.timeout(WAIT_SECONDS):
        while "1 run of blocks is wrong" not in await stage.noted(job.id, 0):
            await stage.nodes.report()
            await asyncio.sleep(0.02)
    assert stage.power.off == []


async def test_an_agent_that_fell_silent_or_thawed_fails_the_planned_failover(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent before the power-off began: what it froze may be thawed, whatever it said last."""
    monkeypatch.setattr(switching_off, "_FRESH_NS", -(10**12))  # every report is too old
    told = await stage.failed(await stage.begun(PLANNED), "not_off")
    assert "last heard" in told
    assert stage.power.off == []  # its power is not cut for nothing


async def test_a_report_must_be_fresh_when_each_source_s_power_off_begins(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def later(vm: uuid.UUID) -> None:
        monkeypatch.setattr(switching_off, "_FRESH_NS", -(10**12))
        assert stage.power.off == [vm]

    stage.power.then = later
    job = await stage.begun(PLANNED)
    told = await stage.failed(job, "not_off")
    assert "was not off in time" in told
    (failover,) = await stage.failovers(job)
    assert "switch it on again" in failover.notes


async def test_a_source_that_was_perhaps_switched_off_is_told_of(stage: RecoveryStage) -> None:
    """The job is cancelled while its vCenter is at it; or it says that it could not."""
    begun = asyncio.Event()

    async def endless(vm: uuid.UUID) -> None:
        begun.set()
        await asyncio.Event().wait()

    stage.power.then = endless
    job = await stage.begun(PLANNED)
    await asyncio.wait_for(begun.wait(), WAIT_SECONDS)
    async with stage.database.writing() as session:
        ask_to_cancel(await find_job(session, job.id, lock=True), stage.clock())
    stage.protection.performer.wake(job.id)
    job = await stage.ended(job.id)
    assert job.state == "cancelled"
    (failover,) = await stage.failovers(job)
    assert PERHAPS_OFF in failover.notes
    stage.power.refuses = "no answer in time"
    job = await stage.begun(PLANNED)
    await stage.failed(job, "not_off")
    (failover,) = await stage.failovers(job)
    assert PERHAPS_OFF in failover.notes

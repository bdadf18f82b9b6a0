"""Failovers and test failovers of one machine, from the request to nothing being left."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import delete, select

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.protection import requests
from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.jobs import steps_of
from appliance.config_server.protection.machines import BusyError
from appliance.config_server.protection.placement import PlacementError
from appliance.config_server.recovery import failing_over, room
from appliance.config_server.recovery.follow_up import cancel, change_point, commit
from appliance.config_server.recovery.intake import take_points
from appliance.config_server.recovery.locking import lock_point
from appliance.config_server.recovery.requests import _source_time, clean_up
from appliance.config_server.recovery.run import FailoverKind, FailoverOptions
from appliance.config_server.store.recovery_tables import Failover, RecoveredVm
from appliance.config_server.store.schema import Certificate, Machine
from replication.control.recovery import ListedPoint, PointChoice, PointList
from replication.errors import ConflictError, InputError, NotFoundError
from tests.appliance.config_server.protection.stage import APPLIER, GIB, MACHINE, WAIT_SECONDS
from tests.appliance.config_server.recovery.stage import (
    COMPUTE,
    OTHER,
    VMS,
    RecoveryStage,
    open_recovery,
)

TEST, PLANNED, UNPLANNED = FailoverKind.TEST, FailoverKind.PLANNED, FailoverKind.UNPLANNED


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[RecoveryStage]:
    async with open_recovery(tmp_path) as opened:
        await opened.protected()
        yield opened


async def test_a_source_s_clock_that_is_far_off_counts_as_ours(stage: RecoveryStage) -> None:
    """A node's word is in a column: it cannot make the request fail, or the RPO absurd."""
    heard = stage.nodes.reports[MACHINE]
    told = heard.report.model_copy(update={"time_ns": 2**63 - 1})
    async with stage.asking() as asking:
        machine = await asking.session.get_one(Machine, MACHINE)
        known = Heard(asking.now_ns, told)
        other = replace(asking, ports=replace(asking.ports, newest=lambda _: known))
        assert await _source_time(other, machine) == asking.now_ns


async def test_a_defect_fails_its_step_and_is_not_begun_again(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(failing_over, "judge_disks", broken)
    await stage.failed(await stage.begun(TEST), "defect")


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


async def test_what_cannot_be_made_fails_and_leaves_the_machine_protected(
    stage: RecoveryStage,
) -> None:
    told = await stage.failed(await stage.begun(TEST, "no-such-point"), "point_refused")
    assert "there is no point no-such-point" in told
    stage.nodes.broken["web-1"] = "no room for the overlay"
    told = await stage.failed(await stage.begun(UNPLANNED), "vm_failed")
    assert "no room for the overlay" in told
    stage.nodes.broken.clear()
    stage.power.refuses = "the vCenter burns"
    told = await stage.failed(await stage.begun(PLANNED), "not_off")
    assert "the vCenter burns" in told
    assert not (await stage.machine()).final_wanted
    stage.power.refuses = ""
    stage.nodes.frozen_not = "the disk /dev/sdb has no file system"
    told = await stage.failed(await stage.begun(PLANNED), "not_frozen")
    assert "no file system" in told
    stage.nodes.frozen_not = ""
    assert (await stage.failed_over(PLANNED)).final == 3  # each order has a number of its own


async def test_no_room_no_compute_node_no_state_begin_nothing(stage: RecoveryStage) -> None:
    stage.nodes.memory_bytes = GIB
    await stage.nodes.report()
    big = FailoverOptions(memory_bytes=2 * GIB)
    with pytest.raises(PlacementError, match=r"2048 MiB.*1024 MiB"):
        await stage.begun(TEST, options=big)
    with pytest.raises(PlacementError, match="no compute node elsewhere"):
        await stage.begun(TEST, compute="elsewhere")
    with pytest.raises(ConflictError, match="not protected"):
        await stage.begun(TEST, machine=OTHER)
    await stage.failed_over(TEST)
    half = FailoverOptions(memory_bytes=GIB * 3 // 4)
    with pytest.raises(PlacementError, match=r"1280 MiB.*1024 MiB"):
        await stage.begun(TEST, options=half)
    async with stage.database.writing() as session:
        await session.execute(delete(Certificate).where(Certificate.node_id == COMPUTE))
    with pytest.raises(PlacementError, match="no compute node can take the machine"):
        await stage.begun(UNPLANNED)
    assert (await stage.machine()).state == "protected"
    assert (await stage.machine()).job_id is None


async def test_a_point_that_was_never_listed_begins_nothing(stage: RecoveryStage) -> None:
    points = PointList(
        machine=MACHINE,
        points=(ListedPoint(name="old", position=1, time_ns=1, consistency="crash"),),
    )
    async with stage.database.writing() as session:
        await take_points(session, APPLIER, points, stage.clock())
    with pytest.raises(NotFoundError, match=r"web-1 has no recovery point nothing .*points web-1"):
        await stage.begun(TEST, "nothing")
    with pytest.raises(NotFoundError, match="no app-consistent"):
        await stage.begun(UNPLANNED, PointChoice.LATEST_APP_CONSISTENT)
    failover = await stage.failed_over(UNPLANNED, "old")
    with pytest.raises(NotFoundError, match="no recovery point nothing"):
        async with stage.asking() as asking:
            await change_point(asking, failover.id, "nothing")
    stage.nodes.point_count = 2  # more than are listed
    await stage.nodes.report()
    job = await stage.ended((await stage.begun(TEST, "newer")).id)
    assert job.error is None


async def test_a_test_and_a_failover_share_no_network(stage: RecoveryStage) -> None:
    with pytest.raises(ConflictError, match="that of failovers"):
        await stage.begun(TEST, network="default")
    job = await stage.ended((await stage.begun(TEST, network="lab")).id)
    assert job.error is None
    with pytest.raises(ConflictError, match="the test of web-1 is on it"):
        await stage.begun(UNPLANNED, network="lab")
    job = await stage.ended((await stage.begun(UNPLANNED, network="site")).id)
    assert job.error is None
    with pytest.raises(ConflictError, match="that of the failover of web-1"):
        await stage.begun(TEST, network="site")
    async with stage.database.reading() as session:
        vms = await session.scalars(select(RecoveredVm))
        found = {vm.document["network"]: vm.document["isolated"] for vm in vms}
    assert found == {"lab": True, "site": False}


async def test_the_latest_that_takes_too_long_gives_way_to_what_is_processed(
    stage: RecoveryStage,
) -> None:
    stage.nodes.behind.add(MACHINE)
    job = await stage.begun(TEST, options=FailoverOptions(wait_seconds=1))
    assert "waits for the applier" in await stage.noted(job.id, 0)
    job = await stage.ended(job.id)
    assert job.error is None
    assert "newest processed point" in steps_of(job)[0].note
    (failover,) = await stage.failovers(job)
    assert (failover.choice, failover.point) == ("latest", "newest")
    assert await stage.there() == (["web-1-test"], ["latest-processed"])


async def test_tests_stand_in_nobody_s_way(stage: RecoveryStage) -> None:
    """Two at once, of other points; the machine is another job's meanwhile."""
    stage.nodes.stuck.add("web-1-test")
    jobs = [await stage.begun(TEST, point) for point in ("old", "latest-app-consistent")]
    async with stage.asking() as asking:
        resync = await requests.resync(asking, "web-1", now=True)
    await stage.protection.begin(resync.id)
    assert (await stage.ended(resync.id)).error is None
    with pytest.raises(BusyError, match="at work on a failover"):
        async with stage.asking() as asking:
            await requests.unprotect(asking, "web-1", keep_points=True)
    stage.nodes.stuck.clear()
    found = [(await stage.failovers(await stage.ended(job.id)))[0] for job in jobs]
    assert [(row.state, row.point) for row in found] == [("up", "old"), ("up", "newer")]
    assert found[0].network != found[1].network


async def test_a_failover_keeps_other_jobs_off_its_machine(stage: RecoveryStage) -> None:
    stage.nodes.stuck.add("web-1")
    job = await stage.begun(UNPLANNED)
    with pytest.raises(BusyError, match="failing-over"):
        await stage.begun(UNPLANNED)
    with pytest.raises(BusyError):
        async with stage.asking() as asking:
            await requests.unprotect(asking, "web-1", keep_points=True)
    stage.nodes.stuck.clear()
    (failover,) = await stage.failovers(await stage.ended(job.id))
    with pytest.raises(ConflictError, match="failed-over"):
        await stage.begun(PLANNED)
    with pytest.raises(ConflictError, match="nothing to clean up"):
        async with stage.asking() as asking:
            await clean_up(asking, failover.id)
    test = await stage.failed_over(TEST, "old")
    with pytest.raises(ConflictError, match="a test failover"):
        async with stage.asking() as asking:
            await commit(asking, test.id)


async def test_a_point_that_does_not_come_up_leaves_the_old_one_running(
    stage: RecoveryStage,
) -> None:
    failover = await stage.failed_over(UNPLANNED)
    stage.nodes.unwell["web-1"] = "it does not answer"
    async with stage.asking() as asking:
        job = await change_point(asking, failover.id, "old")
    await stage.protection.begin(job.id)
    job = await stage.ended(job.id)
    assert job.error is not None
    assert job.error["code"] == "check_failed"
    (after,) = await stage.failovers(job)
    assert (after.vm_id, after.next_vm_id, after.point) == (failover.vm_id, None, "newest")
    async with asyncio.timeout(WAIT_SECONDS):
        while await stage.there() != (["web-1"], ["latest"]):
            await stage.recovery.look()
    async with stage.database.reading() as session:
        assert (await session.get_one(RecoveredVm, failover.vm_id)).wanted == "on"
    assert (await stage.machine()).state == "failed-over"


async def test_an_unprotected_machine_leaves_no_vm_and_no_hold(stage: RecoveryStage) -> None:
    await stage.failed_over(TEST, "old")
    failover = await stage.failed_over(UNPLANNED)
    async with stage.asking() as asking:
        job = await requests.unprotect(asking, "web-1", keep_points=False)
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).error is None
    assert await stage.there() == ([], [])
    machine = await stage.machine()
    assert (machine.state, machine.points) == ("unprotected", "")
    async with stage.database.reading() as session:
        row = await session.get_one(Failover, failover.id)
        assert (row.state, row.job_id) == ("cancelled", None)


async def test_a_committed_vm_outlives_protection_until_somebody_cleans_it_up(
    stage: RecoveryStage,
) -> None:
    failover = await stage.failed_over(UNPLANNED)
    async with stage.asking() as asking:
        job = await commit(asking, failover.id, delete_points=True)
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).error is None
    await stage.machine_when(lambda machine: machine.points == "")
    with pytest.raises(ConflictError, match="nothing to clean up"):
        async with stage.asking() as asking:
            await clean_up(asking, failover.id)
    async with stage.asking() as asking:
        job = await requests.unprotect(asking, "web-1", keep_points=True)
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).error is None
    assert await stage.there() == (["web-1"], [])
    async with stage.asking() as asking:
        job = await clean_up(asking, failover.id)
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).error is None
    assert await stage.there() == ([], [])


async def test_a_lock_keeps_points_until_its_date_and_is_only_made_longer(
    stage: RecoveryStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = stage.clock() + 2 * 10**9
    machine = await stage.machine()
    with pytest.raises(NotFoundError, match="no recovery point old"):
        async with stage.asking() as asking:
            await lock_point(asking, machine, "old", soon)
    point = ListedPoint(name="old", position=1, time_ns=1, consistency="crash")
    other = point.model_copy(update={"name": "other"})
    async with stage.asking() as asking:
        machine = await asking.session.get_one(Machine, MACHINE)
        told = PointList(machine=MACHINE, points=(point, other))
        await take_points(asking.session, APPLIER, told, asking.now_ns)
        await lock_point(asking, machine, "old", soon)
        await lock_point(asking, machine, "old", soon + 1)
    late = stage.clock() + 11 * 366 * 86400 * 10**9
    monkeypatch.setattr(room, "LOCKS_MAX", 1)
    for until_ns, why in ((soon, "longer"), (1, "over already"), (late, "10 years")):
        with pytest.raises((ConflictError, InputError), match=why):
            async with stage.asking() as asking:
                await lock_point(asking, machine, "old", until_ns)
    with pytest.raises(ConflictError, match="1 points of the applier are locked"):
        async with stage.asking() as asking:
            await lock_point(asking, machine, "other", soon)
    with pytest.raises(ConflictError, match="locked by alice"):
        async with stage.asking() as asking:
            await requests.unprotect(asking, "web-1", keep_points=False)
    assert await stage.there() == ([], ["old"])
    await stage.nothing_is_left()
    assert stage.clock() > soon


async def test_what_a_silent_compute_node_has_goes_when_it_is_heard_again(
    tmp_path: Path,
) -> None:
    jobs = JobsConfig(answer_seconds_max=1, sweep_seconds=0.3)
    async with open_recovery(tmp_path, jobs=jobs) as stage:
        await stage.protected()
        failover = await stage.failed_over(UNPLANNED)
        stage.nodes.stubborn.add(COMPUTE)
        async with stage.asking() as asking:
            job = await cancel(asking, failover.id)
        await stage.protection.begin(job.id)
        job = await stage.ended(job.id)
        assert job.error is not None
        assert job.error["code"] == "no_answer"
        assert (await stage.machine()).state == "cancelling"
        assert (await stage.there())[1] == ["latest"]  # the VM may still read from it
        stage.nodes.stubborn.clear()
        await stage.machine_is(MACHINE, "protected")
        await stage.nothing_is_left()

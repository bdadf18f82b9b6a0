"""Jobs from the request to the end, on real workflows."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from appliance.config_server.nodes.assignments import (
    Protected,
    for_applier,
    for_process_server,
)
from appliance.config_server.protection import requests
from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.jobs import (
    JobState,
    StepState,
    ask_to_cancel,
    find_job,
    steps_of,
)
from appliance.config_server.protection.machines import (
    BusyError,
    candidates,
    disks_of,
    find_node,
)
from appliance.config_server.protection.table import IllegalTransitionError
from appliance.config_server.protection.transition import KEPT
from appliance.config_server.store.schema import Certificate, DataKey, Job, Machine, Node
from replication.control.report import BlockDevice
from replication.control.role import NodeRole
from replication.errors import ConflictError, NotFoundError
from tests.appliance.config_server.protection.stage import (
    APPLIER,
    DEVICES,
    GIB,
    JOBS,
    MACHINE,
    SERVER,
    Stage,
    certificate,
    open_stage,
)


@pytest.fixture
async def stage(tmp_path: Path, database_url: str) -> AsyncIterator[Stage]:
    async with open_stage(tmp_path, database_url) as opened:
        yield opened


async def ask(stage: Stage, kind: str, **options: Any) -> Job:
    async with stage.asking() as asking:
        job: Job = await getattr(requests, kind)(asking, "web-1", **options)
    await stage.protection.begin(job.id)
    return job


async def done(stage: Stage, kind: str, **options: Any) -> Job:
    job = await stage.ended((await ask(stage, kind, **options)).id)
    assert (job.state, job.error) == (JobState.SUCCEEDED, None)
    return job


async def protect(stage: Stage, **options: Any) -> None:
    await done(stage, "protect", policy="gold", **options)
    await stage.state("protected")


async def excluded(stage: Stage) -> dict[int, bool]:
    async with stage.database.reading() as session:
        return {disk.index: disk.excluded for disk in await disks_of(session, MACHINE)}


async def test_a_machine_is_protected_and_unprotected(stage: Stage) -> None:
    job = await done(stage, "protect", policy="gold")
    assert {step.state for step in steps_of(job)} == {StepState.DONE}
    assert job.instance == stage.protection.instance
    machine = await stage.machine()
    assert (machine.state, machine.job_id) == ("initial-replication", None)
    assert (machine.process_server_id, machine.applier_id) == (SERVER, APPLIER)
    assert stage.nodes.keys_made == 1
    await stage.state("protected")

    await done(stage, "unprotect", keep_points=False)
    machine = await stage.machine()
    assert (machine.state, machine.points, machine.applier_id) == ("unprotected", "", None)
    assert (machine.policy_id, machine.process_server_id) == (None, None)
    assert await excluded(stage) == {}


async def test_points_that_were_kept_are_removed_later_and_the_key_stays(stage: Stage) -> None:
    await protect(stage)
    await done(stage, "unprotect", keep_points=True)
    machine = await stage.machine()
    assert (machine.state, machine.points) == ("unprotected", "kept")
    assert machine.applier_id == APPLIER
    await protect(stage)
    await done(stage, "unprotect", keep_points=True)
    assert stage.nodes.keys_made == 1
    await done(stage, "unprotect", keep_points=False)
    machine = await stage.machine()
    assert (machine.state, machine.points, machine.applier_id) == ("unprotected", "", None)
    async with stage.database.reading() as session:
        assert await session.get(DataKey, MACHINE) is not None


async def removed_at_the_applier(stage: Stage) -> bool:
    """What the applier would be told to delete, if it were told now."""
    async with stage.database.reading() as session:
        machine = await session.get_one(Machine, MACHINE)
        node = await session.get_one(Node, APPLIER)
        return MACHINE in for_applier(node, [Protected(machine, None)]).removed


async def test_a_removal_that_is_cancelled_before_the_applier_is_told_keeps_the_points(
    stage: Stage,
) -> None:
    await protect(stage)
    async with stage.asking() as asking:
        job = await requests.unprotect(asking, "web-1", keep_points=False)
        assert (await asking.session.get_one(Machine, MACHINE)).points == KEPT
        ask_to_cancel(job, asking.now_ns)
    assert not await removed_at_the_applier(stage)
    await stage.protection.begin(job.id)
    assert (await stage.ended(job.id)).state == JobState.CANCELLED
    assert ((await stage.machine()).state, (await stage.machine()).points) == ("disabling", KEPT)
    assert not await removed_at_the_applier(stage)

    await done(stage, "unprotect", keep_points=True)
    machine = await stage.machine()
    assert (machine.state, machine.points, machine.applier_id) == ("unprotected", KEPT, APPLIER)
    assert not await removed_at_the_applier(stage)


async def test_points_cannot_be_kept_once_the_applier_was_told_to_delete_them(stage: Stage) -> None:
    await protect(stage)
    stage.nodes.stubborn.add(APPLIER)
    job = await ask(stage, "unprotect", keep_points=False)
    await stage.noted(job.id, 3)
    assert await removed_at_the_applier(stage)
    async with stage.database.writing() as session:
        ask_to_cancel(await find_job(session, job.id), stage.clock())
    assert (await stage.ended(job.id)).state == JobState.CANCELLED
    with pytest.raises(ConflictError, match="was told to delete the points"):
        await ask(stage, "unprotect", keep_points=True)
    stage.nodes.stubborn.clear()
    await done(stage, "unprotect", keep_points=False)
    assert (await stage.machine()).points == ""


async def test_points_are_not_settled_while_the_process_server_still_sends(stage: Stage) -> None:
    await protect(stage)
    stage.nodes.stubborn.add(SERVER)
    job = await ask(stage, "unprotect", keep_points=False)
    assert await stage.noted(job.id, 3) == "waits for ps-1; 20 seconds at most"
    async with stage.database.reading() as session:
        node = await session.get_one(Node, SERVER)
        machine = await session.get_one(Machine, MACHINE)
        assert for_process_server(node, [machine], []).ended == (MACHINE,)
        assert node.assignment_version > stage.nodes.reports[SERVER].report.assignment
    stage.nodes.stubborn.clear()
    assert (await stage.ended(job.id)).state == JobState.SUCCEEDED


async def add_node(stage: Stage, name: str, role: NodeRole = NodeRole.MACHINE) -> uuid.UUID:
    node = uuid.uuid4()
    async with stage.database.writing() as session:
        session.add(Node(id=node, role=role, name=name, enrolled_ns=stage.clock()))
        await session.flush()
        session.add(certificate(node, stage.clock()))
    return node


async def revoke(stage: Stage, node: uuid.UUID) -> None:
    async with stage.database.writing() as session:
        gone = update(Certificate).where(Certificate.node_id == node)
        await session.execute(gone.values(revoked_ns=stage.clock()))


async def test_a_name_that_is_another_ones_id_does_not_hide_it(stage: Stage) -> None:
    await add_node(stage, str(MACHINE))
    async with stage.asking() as asking:
        assert (await find_node(asking.session, str(MACHINE), asking.now_ns)).id == MACHINE


async def test_a_name_is_only_of_nodes_with_a_good_certificate(stage: Stage) -> None:
    older = await add_node(stage, "web-1")
    with pytest.raises(ConflictError, match="more than one machine"):
        await ask(stage, "protect", policy="gold")
    await revoke(stage, older)
    async with stage.asking() as asking:
        assert (await find_node(asking.session, "web-1", asking.now_ns)).id == MACHINE
        assert (await find_node(asking.session, str(older), asking.now_ns)).id == older
    await revoke(stage, MACHINE)
    with pytest.raises(NotFoundError, match="has a certificate that is good") as refused:
        await ask(stage, "protect", policy="gold")
    assert "by its id" in (refused.value.hint or "")

    twin = await add_node(stage, "applier-1", NodeRole.APPLIER)
    await revoke(stage, APPLIER)
    async with stage.asking() as asking:
        found = await candidates(asking.session, asking.ports, NodeRole.APPLIER, stage.clock())
    assert {each.id: each.is_live for each in found} == {APPLIER: False, twin: True}
    assert next(each for each in found if each.id == APPLIER).trouble


async def test_a_failing_agent_undoes_the_protection(stage: Stage) -> None:
    stage.nodes.failed = "the kernel has no BTF"
    job = await stage.ended((await ask(stage, "protect", policy="gold")).id)
    assert job.state == JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "agent_failed"
    assert "no BTF" in job.error["message"]
    assert job.error["hint"]
    machine = await stage.machine()
    assert (machine.state, machine.job_id, machine.policy_id) == ("unprotected", None, None)
    await stage.machine_when(lambda machine: machine.points == "")
    stage.nodes.failed = ""
    await protect(stage)


async def test_a_cancelled_job_undoes_what_it_began(stage: Stage) -> None:
    stage.nodes.stubborn.add(SERVER)
    job = await ask(stage, "protect", policy="gold")
    assert "ps-1" in await stage.noted(job.id, 2)
    async with stage.database.writing() as session:
        ask_to_cancel(await find_job(session, job.id, lock=True), stage.clock())
    stage.protection.performer.wake(MACHINE)
    job = await stage.ended(job.id)
    assert (job.state, job.error) == (JobState.CANCELLED, None)
    assert (await stage.machine()).state == "unprotected"
    assert [step.state for step in steps_of(job)] == [
        "done",
        "done",
        "failed",
        "skipped",
        "skipped",
    ]
    with pytest.raises(ConflictError, match="was cancelled"):
        ask_to_cancel(job, 0)


async def test_who_does_not_answer_fails_the_job_in_time(tmp_path: Path) -> None:
    config = JobsConfig(**{**JOBS.model_dump(), "answer_seconds_max": 0.3})
    async with open_stage(tmp_path, jobs=config) as stage:
        stage.nodes.stubborn.add(MACHINE)
        job = await stage.ended((await ask(stage, "protect", policy="gold")).id)
        assert job.error is not None
        assert job.error["code"] == "no_answer"
        assert job.error["message"] == "the agent did not answer within 0 seconds"
        assert "agent runs" in job.error["hint"]
        assert (await stage.machine()).state == "unprotected"

        await stage.machine_when(lambda machine: machine.points == "")
        stage.nodes.stubborn.clear()
        await protect(stage)
        # An agent that is gone for good does not keep anybody from ending the protection ...
        stage.nodes.stubborn.add(MACHINE)
        job = await done(stage, "unprotect", keep_points=True)
        assert "gone on without" in steps_of(job)[2].note
        # ... but points are not taken for deleted when they are not.
        stage.nodes.stubborn.add(APPLIER)
        job = await stage.ended((await ask(stage, "unprotect", keep_points=False)).id)
        assert job.state == JobState.FAILED
        assert (await stage.machine()).state == "disabling"
        stage.nodes.stubborn.clear()
        await done(stage, "unprotect", keep_points=False)


async def test_of_two_operators_one_wins_and_the_other_hears_who_did(stage: Stage) -> None:
    async def by(who: str) -> Job | ConflictError:
        try:
            async with stage.asking(who) as asking:
                return await requests.protect(asking, "web-1", policy="gold")
        except ConflictError as conflict:
            return conflict

    outcomes = await asyncio.gather(*(by(who) for who in ("alice", "bob", "carol")))
    jobs = [each for each in outcomes if isinstance(each, Job)]
    conflicts = [each for each in outcomes if isinstance(each, BusyError)]
    assert (len(jobs), len(conflicts)) == (1, 2)
    for conflict in conflicts:
        assert f"asked for by {jobs[0].asked_by}" in str(conflict)
        assert "enabling" in str(conflict)
    await stage.protection.begin(jobs[0].id)
    await stage.protection.begin(jobs[0].id)
    assert (await stage.ended(jobs[0].id)).state == JobState.SUCCEEDED
    assert stage.nodes.keys_made == 1


async def test_a_job_that_nobody_started_is_found(stage: Stage) -> None:
    async with stage.asking() as asking:
        job = await requests.protect(asking, "web-1", policy="gold")
    assert (await stage.ended(job.id)).state == JobState.SUCCEEDED


async def test_disks_are_left_out_added_and_excluded(stage: Stage) -> None:
    await protect(stage, disks=("/dev/sda",))
    assert await excluded(stage) == {0: False, 1: True}
    await done(stage, "add_disk", name="/dev/sdb")
    assert await excluded(stage) == {0: False, 1: False}
    with pytest.raises(ConflictError, match="replicated already"):
        await ask(stage, "add_disk", name="/dev/sdb")
    await done(stage, "exclude_disk", index=1)
    assert await excluded(stage) == {0: False, 1: True}
    new = BlockDevice(id="wwn-2", device="/dev/sdc", size_bytes=GIB)
    stage.nodes.devices = (*DEVICES, new)
    await stage.nodes.report()
    await done(stage, "add_disk", name="wwn-2")
    assert await excluded(stage) == {0: False, 1: True, 2: False}
    with pytest.raises(Exception, match="system disk"):
        await ask(stage, "exclude_disk", index=0)
    await done(stage, "unprotect", keep_points=True)
    await protect(stage, disks=("/dev/sda", "/dev/sdc"))
    assert await excluded(stage) == {0: False, 1: True, 2: False}


async def test_a_resync_is_ordered_now_or_by_the_window(stage: Stage) -> None:
    with pytest.raises(IllegalTransitionError, match="unprotected"):
        await ask(stage, "resync", now=True)
    await protect(stage)
    job = await done(stage, "resync", now=True)
    machine = await stage.machine()
    assert machine.resync_request == job.request["order"] == 1
    await stage.state("protected")
    await ask(stage, "resync", now=False)
    machine = await stage.machine()
    assert (machine.state, machine.cause) == ("resync-required", "operator")
    assert machine.resync_in_window
    assert machine.resync_request == 1
    machine = await stage.state("protected")
    assert machine.resync_request == 2


async def test_an_order_is_above_all_that_the_agent_has_carried_out(stage: Stage) -> None:
    """Else a database that was put back would call a resync done that nobody has begun."""
    await protect(stage)
    stage.nodes.carried_out = 7
    await stage.nodes.report()
    await done(stage, "resync", now=True)
    assert (await stage.machine()).resync_request == stage.nodes.carried_out == 8
    await stage.state("protected")
    stage.nodes.carried_out = 20
    await stage.nodes.report()
    await done(stage, "resync", now=False)  # the next one is refused while this one's job runs
    assert (await stage.state("protected")).resync_request == 21
    stage.nodes.silent.add(MACHINE)  # what it says is not known yet when the order is given
    stage.nodes.carried_out = 30
    job = await ask(stage, "resync", now=True)
    assert (await stage.machine()).resync_request == 22
    stage.nodes.silent.clear()
    assert (await stage.ended(job.id)).state == "succeeded"
    assert (await stage.machine()).resync_request == stage.nodes.carried_out == 31


async def test_a_resize_is_seen_and_ordered_when_the_window_opens(stage: Stage) -> None:
    await protect(stage)
    grown = DEVICES[1].model_copy(update={"size_bytes": 2 * GIB})
    stage.nodes.devices = (DEVICES[0], grown)
    await stage.nodes.report()
    await stage.protection.observer.look()
    machine = await stage.machine()
    assert (machine.state, machine.cause) == ("resync-required", "disk-resized")
    assert str(2 * GIB) in machine.reason
    assert machine.resync_request == 1
    await stage.state("protected")
    async with stage.database.reading() as session:
        assert (await disks_of(session, MACHINE))[1].size_bytes == 2 * GIB

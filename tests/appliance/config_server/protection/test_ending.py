"""A job whose end fails: it is tried again, then the machine is let go of, and people can go on."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config_server.protection import ending, requests, transition, workflows
from appliance.config_server.protection.jobs import (
    NOT_UNDONE,
    JobKind,
    StepState,
    new_job,
    steps_of,
)
from appliance.config_server.protection.table import Event
from appliance.config_server.protection.workflow import Outside
from appliance.config_server.store.schema import Job
from tests.appliance.config_server.protection.stage import MACHINE, Stage, open_stage

TRIES = 3


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    monkeypatch.setattr(ending, "ENDING_TRIES_MAX", TRIES)
    monkeypatch.setattr(ending, "ENDING_RETRY_SECONDS", 0.01)
    async with open_stage(tmp_path) as opened:
        yield opened


class Refusing:
    """`enter` that raises for one event, so many times."""

    def __init__(self, event: Event, times: int = 10**6) -> None:
        self.event = event
        self.times = times
        self.tried = 0
        self.enter = transition.enter

    def __call__(self, machine: Any, event: Event, *rest: Any, **options: Any) -> Any:
        if event is self.event:
            self.tried += 1
            if self.tried <= self.times:
                raise RuntimeError("no such column")
        return self.enter(machine, event, *rest, **options)


async def asked(stage: Stage, kind: str, **options: Any) -> Job:
    async with stage.asking() as asking:
        job: Job = await getattr(requests, kind)(asking, "web-1", **options)
    await stage.protection.begin(job.id)
    return await stage.ended(job.id)


async def test_an_end_that_fails_at_first_is_tried_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Refusing(Event.ENABLED, TRIES - 1)
    monkeypatch.setattr(workflows, "enter", refusing)
    job = await asked(stage, "protect", policy="gold")
    assert (job.state, job.error, refusing.tried) == ("succeeded", None, TRIES)
    assert "cannot end, tried 2 times: RuntimeError" in steps_of(job)[-1].note


async def test_a_success_that_cannot_be_written_is_undone(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Refusing(Event.ENABLED)
    monkeypatch.setattr(workflows, "enter", refusing)
    job = await asked(stage, "protect", policy="gold")
    assert (job.state, refusing.tried) == ("failed", TRIES)
    assert job.error is not None
    assert job.error["code"] == "defect"
    assert "all steps are done, but the protect could not be ended" in job.error["message"]
    machine = await stage.machine()
    assert (machine.state, machine.job_id) == ("unprotected", None)


async def test_what_cannot_be_undone_is_let_go_of_and_people_go_on(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing = Refusing(Event.ENABLE_FAILED)
    monkeypatch.setattr(workflows, "enter", refusing)
    stage.nodes.failed = "the kernel has no BTF"
    job = await asked(stage, "protect", policy="gold")
    assert (job.state, refusing.tried) == ("failed", TRIES)
    assert job.error is not None
    assert job.error["code"] == NOT_UNDONE
    for told in ("no BTF", "no such column", "web-1 is disabling"):
        assert told in job.error["message"]
    assert "understudy unprotect web-1" in job.error["hint"]
    machine = await stage.machine()
    assert (machine.state, machine.job_id) == ("disabling", None)
    # The sweep has nothing to take up, and the way on is the one that was told.
    await stage.protection.watch.sweep()
    stage.nodes.failed = ""
    assert (await asked(stage, "unprotect", keep_points=False)).error is None
    assert (await stage.machine()).state == "unprotected"
    assert (await asked(stage, "protect", policy="gold")).error is None
    await the_end_of_protection_is_let_go_of_as_well(stage, monkeypatch)


async def the_end_of_protection_is_let_go_of_as_well(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when neither success nor failure can be written."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such column")

    with monkeypatch.context() as patch:
        patch.setattr(workflows, "enter", broken)
        job = await asked(stage, "unprotect", keep_points=True)
    assert job.error is not None
    assert job.error["code"] == NOT_UNDONE
    assert "all steps are done" in job.error["message"]
    assert ((await stage.machine()).state, (await stage.machine()).job_id) == ("disabling", None)
    assert (await asked(stage, "unprotect", keep_points=True)).error is None


async def test_a_job_whose_row_cannot_be_read_ends(stage: Stage) -> None:
    async with stage.asking() as asking:
        job = new_job(
            asking.session,
            JobKind.RESYNC,
            target_id=MACHINE,
            target="web-1",
            steps=("tell the agent",),
            request={"now": True},
            asked_by="alice",
            now_ns=asking.now_ns,
        )
        job.steps = [{"name": 7, "of": "next year"}]
    await stage.protection.begin(job.id)
    job = await stage.ended(job.id)
    assert (job.state, steps_of(job)) == ("failed", [])
    assert job.error is not None
    assert job.error["code"] == "defect"


async def test_a_record_that_fails_fails_its_step_and_the_act_is_not_repeated(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done outside of the database has been done: again would be twice."""
    acts = 0

    async def act(_: object) -> Outside[Any]:
        async def do() -> Any:
            nonlocal acts
            acts += 1

            async def record(_: object) -> None:
                raise RuntimeError("it does not fit")

            return record

        return Outside("acts", do)

    workflow = workflows.WORKFLOWS[JobKind.PROTECT]
    step = replace(workflow.steps[0], act=act)
    table = {
        **workflows.WORKFLOWS,
        JobKind.PROTECT: replace(workflow, steps=(step, *workflow.steps[1:])),
    }
    monkeypatch.setattr(stage.protection.performer, "_workflows", table)
    job = await asked(stage, "protect", policy="gold")
    assert (acts, job.state, steps_of(job)[0].state) == (1, "failed", StepState.FAILED)
    assert job.error is not None
    assert job.error["code"] == "defect"
    assert (await stage.machine()).state == "unprotected"

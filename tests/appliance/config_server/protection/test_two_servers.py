"""Two config servers on one PostgreSQL: what one that dies had under way, the other finishes."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import select

from appliance.config_server.protection import requests
from appliance.config_server.protection.jobs import JobState, StepState, steps_of
from appliance.config_server.protection.machines import BusyError
from appliance.config_server.store.schema import Instance, Job
from daemon.log import configure_log
from tests.appliance.config_server.postgresql import PostgreSQL
from tests.appliance.config_server.protection.stage import JOBS, MACHINE, SERVER, Stage, open_stage

ROOT = Path(__file__).parents[4]
WAITING_STEP = 2


async def stuck(folder: Path, url: str) -> None:
    """A config server whose job waits for a process server that does not do as it is told."""
    async with open_stage(folder, url) as stage:
        stage.nodes.stubborn.add(SERVER)
        async with stage.asking() as asking:
            job = await requests.protect(asking, "web-1", policy="gold")
        await stage.protection.begin(job.id)
        await stage.noted(job.id, WAITING_STEP)
        print(job.id, flush=True)  # noqa: T201
        await asyncio.Event().wait()


@contextlib.contextmanager
def other_server(folder: Path, url: str, module: str = __name__) -> Iterator[Any]:
    """The process of ``module``'s `stuck`; it prints its job's id."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, str(folder), url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


async def test_the_survivor_finishes_what_the_other_had_under_way(
    tmp_path: Path, postgresql: PostgreSQL
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with postgresql.database() as url, other_server(folders[0], url) as other:
        job_id = (await asyncio.to_thread(other.stdout.readline)).strip()
        async with open_stage(folders[1], url) as stage:
            await _nobody_else_touches_it(stage, job_id)
            os.kill(other.pid, signal.SIGKILL)
            job = await stage.ended(job_id)
            assert (job.state, job.error) == (JobState.SUCCEEDED, None)
            assert {step.state for step in steps_of(job)} == {StepState.DONE}
            assert job.instance == stage.protection.instance
            await _once(stage)


async def _nobody_else_touches_it(stage: Stage, job_id: str) -> None:
    """While its heart beats, the job is its own."""
    await asyncio.sleep(JOBS.silence_seconds_max + 1)
    job = await stage.job(job_id)
    assert job.state == JobState.RUNNING
    assert job.instance != stage.protection.instance


async def _once(stage: Stage) -> None:
    async with stage.database.reading() as session:
        assert len((await session.scalars(select(Job))).all()) == 1
        alive = list(await session.scalars(select(Instance.id)))
    machine = await stage.machine()
    assert (machine.id, machine.state, machine.job_id) == (MACHINE, "initial-replication", None)
    async with asyncio.timeout(10):
        while alive != [stage.protection.instance]:
            await asyncio.sleep(0.1)
            async with stage.database.reading() as session:
                alive = list(await session.scalars(select(Instance.id)))


async def test_of_two_operators_the_second_is_told_of_the_first(
    tmp_path: Path, postgresql: PostgreSQL
) -> None:
    """On PostgreSQL the second transaction waits for the first, then sees what that one did."""
    with postgresql.database() as url:
        async with open_stage(tmp_path, url) as stage:

            async def by(who: str) -> Job | BusyError:
                try:
                    async with stage.asking(who) as asking:
                        return await requests.protect(asking, "web-1", policy="gold")
                except BusyError as busy:
                    return busy

            outcomes = await asyncio.gather(*(by(who) for who in ("alice", "bob", "carol")))
            jobs = [each for each in outcomes if isinstance(each, Job)]
            assert len(jobs) == 1
            for each in outcomes:
                assert isinstance(each, Job) or jobs[0].asked_by in str(each)
            await stage.protection.begin(jobs[0].id)
            assert (await stage.ended(jobs[0].id)).state == JobState.SUCCEEDED


if __name__ == "__main__":
    configure_log(daemon="other", level="error")
    asyncio.run(stuck(Path(sys.argv[1]), sys.argv[2]))

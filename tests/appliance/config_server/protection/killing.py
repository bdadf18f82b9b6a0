"""A process that runs jobs in children and has them kill themselves.

``python -m tests.appliance.config_server.protection.killing FOLDER``: each kind of job is run
once undisturbed, then once for each boundary between two durable writes: a child is killed there,
the next one goes on. Prints one JSON object a line. Children are forked, so that only the first
process pays for its imports. ``--server``: URL of a PostgreSQL server, ``{}`` for the database.
"""

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from dbos import DBOS
from sqlalchemy import select

from appliance.config_server.protection import requests
from appliance.config_server.protection.jobs import JobKind
from appliance.config_server.store.schema import Job, Machine, Node, ProtectedDisk
from daemon.log import configure_log
from tests.appliance.config_server.protection.stage import WAIT_SECONDS, Stage, open_stage

CHILDREN_MAX = 4
NEVER = 0
LAST = "kept the end"

ASK: dict[JobKind, tuple[str, dict[str, Any]]] = {
    JobKind.PROTECT: ("protect", {"policy": "gold"}),
    JobKind.UNPROTECT: ("unprotect", {"keep_points": False}),
    JobKind.ADD_DISK: ("add_disk", {"name": "/dev/sdb"}),
    JobKind.EXCLUDE_DISK: ("exclude_disk", {"index": 1}),
    JobKind.RESYNC: ("resync", {"now": True}),
}


class Trap:
    """Counts boundaries, and kills this process at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at
        self.seen: list[str] = []

    def __call__(self, name: str) -> None:
        self.seen.append(name)
        if len(self.seen) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a config server's state is. ``server``: PostgreSQL's, none for SQLite."""

    folder: Path
    server: str | None

    @property
    def url(self) -> str | None:
        return self.server.format(self._database) if self.server else None

    @property
    def _database(self) -> str:
        return self.folder.name.replace("-", "_")

    def make(self) -> None:
        self.folder.mkdir()
        self._execute(f"CREATE DATABASE {self._database}")

    def copy(self, name: str) -> "Place":
        """A place with the same state. Nobody has it open."""
        new = Place(self.folder.parent / name, self.server)
        shutil.copytree(self.folder, new.folder)
        self._execute(f"CREATE DATABASE {new._database} TEMPLATE {self._database}")
        return new

    def _execute(self, statement: str) -> None:
        if self.server is not None:
            url = self.server.format("postgres").replace("+psycopg", "")
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(statement)


async def prepare(place: Place, kind: JobKind) -> None:
    """Bring a machine to where the job starts."""
    trap = Trap(NEVER)
    async with open_stage(place.folder, place.url, boundary=trap) as stage:
        if kind is not JobKind.PROTECT:
            disks = ("/dev/sda",) if kind is JobKind.ADD_DISK else None
            async with stage.asking() as asking:
                job = await requests.protect(asking, "web-1", policy="gold", disks=disks)
            await stage.protection.begin(job.id)
            await stage.ended(job.id)
            await stage.state("protected")
            await sprung(trap)  # else its workflow would be run again by each copy


async def begin(place: Place, kind: JobKind, trap: Trap) -> dict[str, Any]:
    """Ask for the job and see it to its end, unless the trap springs."""
    async with open_stage(place.folder, place.url, boundary=trap) as stage:
        name, options = ASK[kind]
        async with stage.asking() as asking:
            job = await getattr(requests, name)(asking, "web-1", **options)
        await stage.protection.begin(job.id)
        told = await outcome(stage, kind)
        await sprung(trap)
        return {**told, "boundaries": trap.seen}


async def sprung(trap: Trap, count: int = 1) -> None:
    """So many jobs have ended for DBOS as well, or the trap has sprung."""
    async with asyncio.timeout(WAIT_SECONDS):
        while trap.seen.count(LAST) < count:  # noqa: ASYNC110 - the trap has no loop to tell
            await asyncio.sleep(0.01)
        # The last step is done; that the workflow is, DBOS writes down after it.
        while await asyncio.to_thread(  # noqa: ASYNC110 - nor has DBOS
            DBOS.list_workflows, status="PENDING"
        ):
            await asyncio.sleep(0.01)


async def go_on(place: Place, kind: JobKind) -> dict[str, Any]:
    """What a config server does that starts again."""
    async with open_stage(place.folder, place.url) as stage:
        return await outcome(stage, kind)


async def outcome(stage: Stage, kind: JobKind) -> dict[str, Any]:
    """What came of it. Versions of assignments tell how often nodes were told something."""
    async with stage.database.reading() as session:
        job = (await session.scalars(select(Job).where(Job.kind == kind))).one()
    job = await stage.ended(job.id)
    async with stage.database.reading() as session:
        machine = (await session.scalars(select(Machine))).one()
        nodes = await session.scalars(select(Node).order_by(Node.name))
        disks = await session.scalars(select(ProtectedDisk).order_by(ProtectedDisk.index))
        return {
            "state": job.state,
            "error": job.error,
            "steps": [step["state"] for step in job.steps],
            "machine": [machine.state, machine.points, machine.resync_request, machine.job_id],
            "revision": machine.revision,
            "versions": [node.assignment_version for node in nodes],
            "disks": [[disk.index, disk.excluded] for disk in disks],
        }


def child(work: Callable[[], Any], result: Path) -> int:
    """Do ``work`` in a child that writes what came of it; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        result.write_text(json.dumps(work()))
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)  # a traceback would be the parent's to print, not a forked copy's


async def finished(pid: int) -> int:
    """The exit code of a child; less than 0: killed by that signal."""
    return os.waitstatus_to_exitcode((await asyncio.to_thread(os.waitpid, pid, 0))[1])


async def do(place: Place, what: str, work: Callable[[], Any]) -> Any:
    """Work in a child; none when it was killed."""
    result = place.folder / what
    code = await finished(child(work, result))
    if code == -signal.SIGKILL:
        return None
    assert code == 0, f"{result}: ended with {code}"
    return json.loads(result.read_text())


@dataclass(frozen=True, slots=True)
class Play:
    """How jobs are brought to where they start, run, and gone on with.

    worth: which of the boundaries of a whole run are tried, counted from 1.
    """

    prepare: Callable[[Place, JobKind], Coroutine[Any, Any, None]]
    begin: Callable[[Place, JobKind, Trap], Coroutine[Any, Any, dict[str, Any]]]
    go_on: Callable[[Place, JobKind], Coroutine[Any, Any, dict[str, Any]]]
    worth: Callable[[list[str]], list[int]] = lambda seen: list(range(1, len(seen) + 1))


async def run(play: Play, origin: Place, kind: JobKind, kill_at: int) -> dict[str, Any]:
    """A job, killed at a boundary and gone on with; NEVER: undisturbed."""
    place = origin.copy(f"{kind}-{kill_at}")
    told = await do(place, "begun", lambda: asyncio.run(play.begin(place, kind, Trap(kill_at))))
    if told is not None:
        return {"killed": False, **told}
    ended = await do(place, "ended", lambda: asyncio.run(play.go_on(place, kind)))
    return {"killed": True, **ended}


async def main(play: Play, folder: Path, server: str | None, kinds: list[JobKind]) -> None:
    """Run jobs of all kinds, undisturbed and killed everywhere."""
    free = asyncio.Semaphore(CHILDREN_MAX)

    async def one(origin: Place, kind: JobKind, kill_at: int) -> dict[str, Any]:
        async with free:
            told = await run(play, origin, kind, kill_at)
        print(json.dumps({"kind": kind, "kill_at": kill_at, **told}), flush=True)  # noqa: T201
        return told

    async def all_of(kind: JobKind) -> None:
        origin = Place(folder / f"{kind}-origin", server)
        origin.make()
        await do(origin, "prepared", lambda: asyncio.run(play.prepare(origin, kind)))
        whole = await one(origin, kind, NEVER)
        tried = play.worth(whole["boundaries"])
        await asyncio.gather(*(one(origin, kind, kill_at) for kill_at in tried))

    await asyncio.gather(*(all_of(kind) for kind in kinds))


def command(play: Play, kinds: list[JobKind], warm_up_kind: JobKind) -> None:
    """The program: ``FOLDER [--server URL] [--kind KIND]…``."""
    configure_log(daemon="killed", level="error")
    arguments = argparse.ArgumentParser()
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--server")
    arguments.add_argument("--kind", type=JobKind, action="append")
    given = arguments.parse_args()
    warm_up = Place(given.folder / "warm-up", None)
    warm_up.make()
    # What every child would do anew is done once: imports, and the mapping of tables to classes.
    asyncio.run(play.prepare(warm_up, warm_up_kind))
    asyncio.run(main(play, given.folder, given.server, given.kind or kinds))


if __name__ == "__main__":
    command(Play(prepare, begin, go_on), list(ASK), JobKind.RESYNC)

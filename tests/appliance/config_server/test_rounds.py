"""A round that fails is told and tried again; a damaged database alone ends the daemon."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest
from sqlalchemy import select
from structlog.testing import capture_logs

from appliance.config_server.protection.config import JobsConfig
from appliance.config_server.protection.instances import Watch
from appliance.config_server.recovery.drills import keeper as keeping
from appliance.config_server.rounds import Trouble, apart, go_round
from appliance.config_server.store.engine import open_database
from appliance.config_server.store.schema import Node
from daemon.service import Health
from replication.errors import ConflictError, IntegrityError, UnavailableError

WAIT_SECONDS = 20.0
PART = "drills"
Look = Callable[[], Awaitable[Sequence[Trouble]]]


class Rounds:
    """Looks that do what is next in ``does``; the last one for ever."""

    def __init__(self, *does: Exception | Sequence[Trouble]) -> None:
        self.does = list(does)
        self.count = 0

    async def look(self) -> Sequence[Trouble]:
        self.count += 1
        does = self.does[min(self.count, len(self.does)) - 1]
        if isinstance(does, Exception):
            raise does
        return does

    async def reach(self, count: int) -> None:
        async with asyncio.timeout(WAIT_SECONDS):
            while self.count < count:  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def running(look: Look, health: Health) -> AsyncIterator[asyncio.Task[None]]:
    going = go_round(PART, look, health, 0.001, failing="drills cannot be looked after")
    task = asyncio.create_task(going)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no such thing"),
        ConflictError("another one wrote it"),
        UnavailableError("no connection"),
    ],
)
async def test_a_round_that_fails_is_told_and_the_next_one_comes(error: Exception) -> None:
    health = Health()
    rounds = Rounds(error)
    with capture_logs() as logs:
        async with running(rounds.look, health):
            await rounds.reach(3)
            assert str(error) in health.criticals[PART]
            assert "drills cannot be looked after" in health.criticals[PART]
            rounds.does = [()]
            await rounds.reach(rounds.count + 2)
            assert health.criticals == {}
    told = [log for log in logs if log["event"] == "a round has a defect"]
    assert len(told) == isinstance(error, RuntimeError), "in full once, while it lasts"


async def test_a_round_that_is_woken_looks_at_once_and_what_is_not_grave_is_a_warning() -> None:
    health, wake = Health(), asyncio.Event()
    rounds = Rounds((), [Trouble("vCenter b", "its password cannot be opened")], ())
    going = go_round(PART, rounds.look, health, 3600, failing="x", is_grave=False, wake=wake)
    task = asyncio.create_task(going)
    try:
        await rounds.reach(1)
        wake.set()
        await rounds.reach(2)
        await asyncio.sleep(0)
        assert health.warnings == {PART: "vCenter b: its password cannot be opened"}
        assert health.criticals == {}
        wake.set()
        await rounds.reach(3)
        await asyncio.sleep(0)
        assert health.warnings == {}
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_what_only_one_suffers_from_holds_up_no_other() -> None:
    troubles: list[Trouble] = []
    for what in (RuntimeError("a bug"), KeyError("timing"), ConflictError("it is gone")):
        with apart("drill 7", troubles):
            raise what
    assert [str(trouble) for trouble in troubles] == [
        "drill 7: a defect: RuntimeError('a bug')",
        "drill 7: its row cannot be read",
        "drill 7: it is gone",
    ]
    for shared in (UnavailableError("away"), IntegrityError("malformed")):
        with pytest.raises(type(shared)), apart("drill 7", troubles):
            raise shared
    with pytest.raises(keeping.NotOursError), apart("x", troubles, let=(keeping.NotOursError,)):
        raise keeping.NotOursError
    assert len(troubles) == 3


async def test_a_damaged_database_ends_the_daemon(tmp_path: Path) -> None:
    path = tmp_path / "config-server.db"
    async with open_database(f"sqlite+aiosqlite:///{path}") as database:
        await database.engine.dispose()
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        health = Health()

        async def look() -> Sequence[Trouble]:
            async with database.reading() as session:
                await session.execute(select(Node.id))
            return ()

        async with running(look, health) as task, asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(IntegrityError, match="malformed"):
                await task


async def test_a_sweep_that_fails_is_told(tmp_path: Path) -> None:
    """Of jobs, too: as when the workflows' own tables refuse something."""
    async with open_database(f"sqlite+aiosqlite:///{tmp_path}/config-server.db") as database:

        def broken() -> int:
            raise RuntimeError("the clock stands still")

        config = JobsConfig(sweep_seconds=0.1)
        watch = Watch(database, None, config, instance="one", clock=broken)  # type: ignore[arg-type]
        health = Health()
        task = asyncio.create_task(watch.run(health))
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                while not health.criticals:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.01)
            assert "the clock stands still" in health.criticals["jobs"]
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

"""Two config servers on one PostgreSQL: a failover that one of them dies in, the other finishes."""

import asyncio
import os
import signal
import sys
from pathlib import Path

from sqlalchemy import select

from appliance.config_server.recovery.run import FailoverKind
from appliance.config_server.store.recovery_tables import PointHold, RecoveredVm
from daemon.log import configure_log
from tests.appliance.config_server.postgresql import PostgreSQL
from tests.appliance.config_server.protection.test_two_servers import other_server
from tests.appliance.config_server.recovery.stage import open_recovery

CHECK = 5


async def stuck(folder: Path, url: str) -> None:
    """A config server whose VM does not come up."""
    async with open_recovery(folder, url) as stage:
        await stage.protected()
        stage.nodes.stuck.add("web-1")
        job = await stage.begun(FailoverKind.PLANNED)
        await stage.noted(job.id, CHECK)
        print(job.id, flush=True)  # noqa: T201
        await asyncio.Event().wait()


async def test_the_survivor_finishes_the_failover_and_makes_nothing_twice(
    tmp_path: Path, postgresql: PostgreSQL
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with postgresql.database() as url, other_server(folders[0], url, __name__) as other:
        job_id = (await asyncio.to_thread(other.stdout.readline)).strip()
        async with open_recovery(folders[1], url) as stage:
            os.kill(other.pid, signal.SIGKILL)
            job = await stage.ended(job_id)
            assert (job.state, job.error) == ("succeeded", None)
            assert job.instance != stage.protection.instance  # who began the step that it is in
            (failover,) = await stage.failovers(job)
            assert (failover.state, failover.point) == ("up", "final")
            assert (await stage.machine()).state == "failed-over"
            assert stage.power.off == []  # the other one's was the only time
            async with stage.database.reading() as session:
                assert len((await session.scalars(select(PointHold))).all()) == 1
                assert len((await session.scalars(select(RecoveredVm))).all()) == 1
            await stage.recovery.look()
            assert await stage.there() == (["web-1"], ["latest"])


if __name__ == "__main__":
    configure_log(daemon="other", level="error")
    asyncio.run(stuck(Path(sys.argv[1]), sys.argv[2]))

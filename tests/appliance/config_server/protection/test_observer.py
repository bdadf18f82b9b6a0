"""What the observer cannot follow of one machine keeps it from following no other."""

import asyncio
import time
import uuid

import pytest
from structlog.testing import capture_logs

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.nodes.versions import Versions
from appliance.config_server.protection.observer import PART, Observer
from appliance.config_server.protection.policies import create_policy, find_policy
from appliance.config_server.protection.policy import PolicySettings
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import Machine, Node, ProtectedDisk
from daemon.service import Health
from replication.control.report import BlockDevice, MachineReport, Phase
from replication.control.role import NodeRole

BAD, GOOD = uuid.UUID(int=1), uuid.UUID(int=2)
NOW_NS = time.time_ns()


async def furnish(database: Database) -> None:
    async with database.writing() as session:
        settings = PolicySettings(resync_window="always")
        await create_policy(session, "gold", settings, lab=False, now_ns=NOW_NS)
        policy = await find_policy(session, "gold")
        for machine in (BAD, GOOD):
            name = f"m{machine.int}"
            session.add(Node(id=machine, role=NodeRole.MACHINE, name=name, enrolled_ns=0))
            await session.flush()
            row = Machine(id=machine, name=name, state="protected", since_ns=0)
            row.policy_id = policy.id
            session.add(row)
            await session.flush()
            session.add(
                ProtectedDisk(
                    machine_id=machine,
                    index=0,
                    device_id="wwn-0",
                    device="/dev/sda",
                    name="sda",
                    size_bytes=512,
                )
            )


def resized(size_bytes: int) -> MachineReport:
    """Also to a size that no report has, as if one had passed its bounds."""
    disk = BlockDevice(id="wwn-0", device="/dev/sda", size_bytes=1)
    disk = disk.model_copy(update={"size_bytes": size_bytes})
    return MachineReport(time_ns=NOW_NS, phase=Phase.REPLICATING).model_copy(
        update={"devices": (disk,)}
    )


def observer_of(database: Database, heard: dict[uuid.UUID, Heard]) -> Observer:
    versions = Versions(database)

    async def ensure_key(_: object, __: uuid.UUID) -> None:
        raise AssertionError

    return Observer(database, Ports(versions.bump, ensure_key, heard.get), lambda: NOW_NS)


async def sizes(database: Database) -> list[int]:
    async with database.reading() as session:
        rows = [await session.get_one(ProtectedDisk, (machine, 0)) for machine in (BAD, GOOD)]
        return [row.size_bytes for row in rows]


async def test_the_others_are_followed_and_the_defect_is_told(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.config_server.protection.observer.LOOK_SECONDS", 0.05)
    async with open_database(database_url) as database:
        await furnish(database)
        heard = {BAD: Heard(NOW_NS, resized(2**70)), GOOD: Heard(NOW_NS, resized(1024))}
        health = Health()
        with capture_logs() as logs:
            running = asyncio.create_task(observer_of(database, heard).run(health))
            async with asyncio.timeout(20):
                while await sizes(database) != [512, 1024]:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.05)
                await asyncio.sleep(0.3)
                assert str(BAD) in health.criticals[PART]
                assert str(GOOD) not in health.criticals[PART]
                assert await sizes(database) == [512, 1024]
                heard[BAD] = Heard(NOW_NS + 1, resized(2048))
                while health.criticals:  # noqa: ASYNC110 - no event
                    await asyncio.sleep(0.05)
            assert not running.done()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert await sizes(database) == [2048, 1024]
        assert [log["machine"] for log in logs if log["log_level"] == "error"] == [str(BAD)]


async def test_a_stored_report_that_is_none_is_as_if_it_had_never_come(database_url: str) -> None:
    async with open_database(database_url) as database:
        await furnish(database)
        document = resized(1024).model_dump(mode="json")
        async with database.writing() as session:
            for machine, stored in ((BAD, {**document, "time_ns": 10**400}), (GOOD, document)):
                row = await session.get_one(Node, machine)
                row.report, row.seen_ns = stored, NOW_NS
        observer = observer_of(database, {})
        for _ in range(2):
            await observer.look()
            assert observer.defects == {}
        assert await sizes(database) == [512, 1024]

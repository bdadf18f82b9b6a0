"""What was acknowledged is there: after SIGKILL, on a full disk, with a full spool."""

import asyncio
import contextlib
import os
import random
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
import xxhash

from appliance.process_server.config import SPOOL_BYTES_MIN
from replication.bookmark import Stamp
from replication.stream import ATTEMPT_HEADER, DIGEST_HEADER, segment_path
from tests.appliance.process_server.rig import Agent, Certificates, ProcessServer, become
from tests.appliance.process_server.sample import SampleChangeset, make_changeset
from tests.appliance.process_server.test_uploader import Account
from tests.azure_emu.fixtures import EmulatorProcess

KILLS = 4
DISK_BYTES = 12 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of DISK_BYTES."""
    image, folder = tmp_path / "disk.img", tmp_path / "disk"
    image.touch()
    os.truncate(image, DISK_BYTES)
    folder.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m0", str(image)], check=True, capture_output=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


async def send_patiently(
    server: ProcessServer, changeset: SampleChangeset, acknowledged: set[object]
) -> None:
    """Send ``changeset`` to its end, whatever happens to the server meanwhile."""
    while True:
        with contextlib.suppress(aiohttp.ClientError, ConnectionError):
            async with Agent(server, changeset.machine) as agent:
                for index in range(len(changeset.segments)):
                    reply = await agent.put(changeset, index)
                    assert reply.status in (200, 201), reply
                    if (changeset.attempt, index) in acknowledged:
                        assert reply.status == 200
                    acknowledged.add((changeset.attempt, index))
                reply = await agent.commit(changeset)
                assert reply.status in (200, 201), reply
                if changeset.attempt in acknowledged:
                    assert reply.status == 200
                acknowledged.add(changeset.attempt)
                return
        await asyncio.sleep(0.2)


async def test_what_was_acknowledged_survives_kills(
    own_server: ProcessServer, azurite: EmulatorProcess
) -> None:
    choice = random.Random(7)
    account = Account(azurite.connection_string)
    machines = [uuid.uuid4() for _ in range(3)]
    sent: dict[uuid.UUID, list[SampleChangeset]] = {machine: [] for machine in machines}
    done = asyncio.Event()
    acknowledged: set[object] = set()
    own_server.start()

    async def stream(machine: uuid.UUID) -> None:
        while not done.is_set():
            stamp = Stamp(1, len(sent[machine]) + 1)
            changeset = make_changeset(machine, stamp, blocks_per_frame=64, segment_count=3)
            await send_patiently(own_server, changeset, acknowledged)
            sent[machine].append(changeset)
            await asyncio.sleep(0.05)

    try:
        async with asyncio.TaskGroup() as tasks:
            for machine in machines:
                tasks.create_task(stream(machine))
            for _ in range(KILLS):
                await asyncio.sleep(choice.uniform(0.1, 0.6))
                own_server.kill()
                await asyncio.to_thread(own_server.start)
            done.set()
        for machine in machines:
            async with Agent(own_server, machine) as agent:
                newest = sent[machine][-1]
                assert (await agent.state()).state.committed == newest.stamp
                assert (await agent.commit(newest)).status == 200
            await become(lambda newest=newest: account.holds(newest))
            for changeset in sent[machine]:
                assert await account.holds(changeset), changeset.stamp
        assert list((own_server.spool / "incoming").iterdir()) == []
    finally:
        await account.close()


def fill(path: Path) -> None:
    """Take the last block of a file system."""
    with path.open("ab", buffering=0) as file:
        for piece_bytes in (65536, 1024):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(piece_bytes))
            os.fsync(file.fileno())


async def test_full_disk_refuses_and_recovers(
    tmp_path: Path, small_disk: Path, certificates: Certificates, azurite: EmulatorProcess
) -> None:
    machine = uuid.uuid4()
    server = ProcessServer(
        tmp_path, certificates, azurite.connection_string, spool=small_disk / "spool"
    )
    server.start()
    ballast = small_disk / "ballast"
    try:
        async with Agent(server, machine) as agent:
            first = make_changeset(machine, Stamp(1, 1))
            await agent.send(first)
            fill(ballast)
            second = make_changeset(machine, Stamp(1, 2), blocks_per_frame=256)
            before = server.spooled(machine)
            reply = await agent.put(second, 0)
            assert reply.told == (507, "storage")
            assert "the disk is full" in reply.refusal.hint
            assert list((server.spool / "incoming").iterdir()) == []
            fill(ballast)
            empty = make_changeset(machine, Stamp(1, 2), segment_count=0)
            assert (await agent.commit(empty)).told == (507, "storage")
            assert server.spooled(machine) == before
            server.kill()
            ballast.unlink()
            server.start()
            assert (await agent.state()).state.committed == first.stamp
            await agent.send(second)
    finally:
        server.kill()


@pytest.fixture(scope="module")
def small_server(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates, azurite: EmulatorProcess
) -> Iterator[ProcessServer]:
    """A server with the smallest spool that there is; a test leaves it empty."""
    folder = tmp_path_factory.mktemp("small_server")
    server = ProcessServer(
        folder,
        certificates,
        azurite.connection_string,
        spool_bytes_max=SPOOL_BYTES_MIN,
        limits="machine_spool_share_max = 1.0",
    )
    try:
        yield server.start()
    finally:
        server.kill()


@contextlib.asynccontextmanager
async def applied_in_the_end(
    server: ProcessServer, azurite: EmulatorProcess, *machines: uuid.UUID
) -> AsyncIterator[Account]:
    account = Account(azurite.connection_string)
    try:
        yield account
        for machine in machines:
            await account.apply(machine, Stamp(9, 9))
            await become(lambda machine=machine: server.spooled(machine) == [])
    finally:
        await account.close()


def make_large(machine: uuid.UUID, stamp: Stamp, segment_count: int) -> SampleChangeset:
    """A changeset whose segments have 12 MiB: five of them fit into the smallest spool."""
    return make_changeset(
        machine, stamp, segment_count=segment_count, frames_per_segment=12, blocks_per_frame=256
    )


async def test_full_spool_refuses_until_the_applier_catches_up(
    small_server: ProcessServer, azurite: EmulatorProcess
) -> None:
    server, machine = small_server, uuid.uuid4()
    async with (
        applied_in_the_end(server, azurite, machine) as account,
        Agent(server, machine) as agent,
    ):
        for number in range(1, 6):
            await agent.send(make_large(machine, Stamp(1, number), 1))
        reply = await agent.put(make_large(machine, Stamp(1, 6), 1), 0)
        assert reply.told == (429, "spool_full")
        assert int(reply.headers["Retry-After"]) >= 1
        heartbeat = make_changeset(machine, Stamp(1, 6), segment_count=0)
        assert (await agent.commit(heartbeat)).status == 201
        await become(lambda: in_health(server, "warnings", "spool"))
        await account.apply(machine, Stamp(1, 6))
        await become(lambda: server.spooled(machine) == [])
        await agent.send(make_large(machine, Stamp(1, 7), 1))
        await become(lambda: not_in_health(server, "warnings", "spool"))


async def test_attempts_of_agents_that_died_make_room(
    small_server: ProcessServer, azurite: EmulatorProcess
) -> None:
    machine = uuid.uuid4()
    async with (
        applied_in_the_end(small_server, azurite, machine),
        Agent(small_server, machine) as agent,
    ):
        for _ in range(4):  # each dies before its commit
            changeset = make_large(machine, Stamp(1, 1), 2)
            await agent.put_all(changeset)
        assert (await agent.commit(changeset)).status == 201


async def test_halves_of_several_machines_do_not_block_each_other_for_good(
    small_server: ProcessServer, azurite: EmulatorProcess
) -> None:
    machines = (uuid.uuid4(), uuid.uuid4())
    halves = [make_large(machine, Stamp(1, 1), 4) for machine in machines]
    async with (
        applied_in_the_end(small_server, azurite, *machines),
        Agent(small_server, machines[0]) as older,
        Agent(small_server, machines[1]) as younger,
    ):
        for index in (0, 1):
            assert (await older.put(halves[0], index)).status == 201
            assert (await younger.put(halves[1], index)).status == 201
        assert (await older.put(halves[0], 2)).status == 201
        assert (await younger.put(halves[1], 2)).told == (429, "spool_full")
        assert (await older.put(halves[0], 3)).status == 201
        assert (await older.commit(halves[0])).status == 201
        assert (await younger.commit(halves[1])).told == (409, "out_of_order")


async def in_health(server: ProcessServer, kind: str, part: str) -> bool:
    return part in (await server.health())[kind]


async def not_in_health(server: ProcessServer, kind: str, part: str) -> bool:
    return part not in (await server.health())[kind]


async def test_damaged_segment_is_never_uploaded(
    tmp_path: Path, certificates: Certificates, azurite: EmulatorProcess
) -> None:
    machine = uuid.uuid4()
    account = Account(azurite.connection_string)
    server = ProcessServer(tmp_path, certificates, azurite.connection_string)
    server.start()
    try:
        async with Agent(server, machine) as agent:
            changeset = make_changeset(machine, Stamp(1, 1))
            await agent.send(changeset)
            await become(lambda: account.holds(changeset))
            name = next(one for one in server.spooled(machine) if "/000001." in one)
            path = server.spool / str(machine) / name
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
            container = account.blobs.get_container_client(f"{machine.hex}-g00000001-000000000000")
            await container.delete_container()
            await become(lambda: in_health(server, "criticals", f"spool of {machine}"))
            assert not await account.holds(changeset)
            assert (await agent.state()).status == 200
    finally:
        server.kill()
        await account.close()


async def test_sigterm_lets_a_request_end(own_server: ProcessServer) -> None:
    machine = uuid.uuid4()
    own_server.start()
    changeset = make_changeset(machine, Stamp(1, 1), blocks_per_frame=256)
    body = changeset.segments[0]
    began = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield body[:1000]
        began.set()
        await asyncio.sleep(1.0)
        yield body[1000:]

    headers = {
        ATTEMPT_HEADER: changeset.attempt.hex(),
        DIGEST_HEADER: xxhash.xxh3_128_hexdigest(body),
        "Content-Length": str(len(body)),
    }
    async with Agent(own_server, machine) as agent:
        path = segment_path(machine, changeset.stamp, 0)
        request = asyncio.create_task(agent.ask("PUT", path, slowly(), headers))
        await began.wait()
        assert await asyncio.to_thread(own_server.stop) == 0
        assert (await request).status == 201
    assert len(own_server.spooled(machine)) == 1

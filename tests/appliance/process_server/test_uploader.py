"""What arrives in a real Azurite, and what is done when it forgets or is away."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from azure.storage.blob.aio import BlobServiceClient
from azure.storage.queue.aio import QueueClient

from appliance.process_server.config import CacheConfig
from replication.bookmark import NOTHING, Stamp
from replication.cache_layout import (
    CONTROL_CONTAINER,
    WAKE_QUEUE,
    container_name,
    manifest_name,
    segment_name,
    watermark_name,
)
from replication.watermark import Watermark
from tests.appliance.process_server.rig import Agent, Certificates, ProcessServer, become
from tests.appliance.process_server.sample import SampleChangeset, make_changeset
from tests.azure_emu.fixtures import EmulatorProcess

API_VERSION = CacheConfig.model_fields["api_version"].default


class Account:
    """The cache storage account as an applier sees it."""

    def __init__(self, connection_string: str) -> None:
        settings = {"api_version": API_VERSION, "retry_total": 2}
        self.blobs = BlobServiceClient.from_connection_string(connection_string, **settings)
        self.queue = QueueClient.from_connection_string(connection_string, WAKE_QUEUE, **settings)

    async def close(self) -> None:
        await self.blobs.close()
        await self.queue.close()

    async def read(self, container: str, name: str) -> bytes | None:
        blob = self.blobs.get_blob_client(container, name)
        if not await blob.exists():
            return None
        return bytes(await (await blob.download_blob()).readall())

    async def holds(self, changeset: SampleChangeset) -> bool:
        """Whether all of ``changeset`` is there, byte for byte."""
        container = container_name(changeset.machine, changeset.stamp)
        number = changeset.stamp.number
        if await self.read(container, manifest_name(number)) != changeset.content:
            return False
        for index, segment in enumerate(changeset.segments):
            name = segment_name(number, changeset.attempt, index)
            if await self.read(container, name) != segment:
                return False
        return True

    async def names(self, machine: uuid.UUID, stamp: Stamp) -> set[str]:
        container = self.blobs.get_container_client(container_name(machine, stamp))
        if not await container.exists():
            return set()
        return {blob.name async for blob in container.list_blobs()}

    async def apply(
        self, machine: uuid.UUID, applied: Stamp, *, wanted: tuple[str, ...] = (), lost: str = ""
    ) -> None:
        """Write the watermark."""
        container = self.blobs.get_container_client(CONTROL_CONTAINER)
        if not await container.exists():
            await container.create_container()
        watermark = Watermark(machine, applied, b"w" * 16, wanted=wanted, lost=lost)
        name = watermark_name(machine)
        await container.upload_blob(name, watermark.to_bytes(), overwrite=True)


@pytest.fixture
async def account(azurite: EmulatorProcess) -> AsyncIterator[Account]:
    account = Account(azurite.connection_string)
    try:
        yield account
    finally:
        await account.close()


@pytest.fixture(scope="module")
def fragile_azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatorProcess]:
    emulator = EmulatorProcess(tmp_path_factory.mktemp("fragile"))
    try:
        yield emulator
    finally:
        emulator.kill()


@pytest.fixture
def fragile(fragile_azurite: EmulatorProcess) -> EmulatorProcess:
    """An Azurite that may be killed."""
    fragile_azurite.kill()
    fragile_azurite.start()
    return fragile_azurite


async def test_committed_changeset_arrives_and_is_pruned_when_applied(
    server: ProcessServer, account: Account
) -> None:
    machine = uuid.uuid4()
    changesets = [make_changeset(machine, Stamp(1, number)) for number in (1, 2, 3)]
    async with Agent(server, machine) as agent:
        for changeset in changesets:
            await agent.send(changeset)
        for changeset in changesets:
            await become(lambda changeset=changeset: account.holds(changeset))
        await become(lambda: durable(agent, changesets[2]))
        assert len(server.spooled(machine)) == 9
        await account.apply(machine, Stamp(1, 2))
        await become(lambda: len(server.spooled(machine)) == 3)
        state = (await agent.state()).state
        assert (state.watermark.applied, state.committed) == (Stamp(1, 2), Stamp(1, 3))
        await account.apply(machine, Stamp(1, 3))
        await become(lambda: server.spooled(machine) == [])
        assert (await agent.commit(changesets[2])).status == 200
        await agent.send(make_changeset(machine, Stamp(1, 4)))


async def durable(agent: Agent, changeset: SampleChangeset) -> bool:
    return (await agent.state()).state.durable_ns == changeset.manifest.bookmark.time_ns


async def test_uncommitted_segments_stay_here(server: ProcessServer, account: Account) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        await agent.send(make_changeset(machine, Stamp(1, 1), segment_count=1))
        await agent.put_all(make_changeset(machine, Stamp(1, 2)))
        await become(lambda: account.names(machine, Stamp(1, 1)))
        await asyncio.sleep(0.5)
        names = await account.names(machine, Stamp(1, 1))
        assert not [name for name in names if "000000000002" in name]


async def test_each_manifest_is_told_in_the_queue(server: ProcessServer, account: Account) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        await agent.send(make_changeset(machine, Stamp(1, 1)))

    async def told() -> bool:
        messages = [one async for one in account.queue.receive_messages(visibility_timeout=1)]
        return str(machine) in [one.content for one in messages]

    await become(told)


async def test_what_the_applier_wants_is_put_over_what_is_there(
    server: ProcessServer, account: Account
) -> None:
    machine = uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1))
    container = container_name(machine, changeset.stamp)
    names = (segment_name(1, changeset.attempt, 1), manifest_name(1))
    async with Agent(server, machine) as agent:
        await agent.send(changeset)
        await become(lambda: account.holds(changeset))
        for name in names:
            blob = account.blobs.get_blob_client(container, name)
            size = (await blob.get_blob_properties()).size
            await blob.upload_blob(bytes(size), overwrite=True)
        await account.apply(machine, NOTHING, wanted=names)
        await become(lambda: account.holds(changeset))


async def test_lost_stream_and_unknown_wish_are_in_the_health(
    server: ProcessServer, account: Account
) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        await agent.send(make_changeset(machine, Stamp(1, 1)))
        await account.apply(machine, NOTHING, wanted=("nothing/here",), lost="the store is gone")

        async def told() -> bool:
            warnings = str((await server.health())["warnings"])
            return "the store is gone" in warnings and "nothing/here" in warnings

        await become(told)
        await account.apply(machine, NOTHING)
        await become(lambda: cleared(server))


async def cleared(server: ProcessServer) -> bool:
    return "lost" not in str(await server.health()) and (await server.health())["state"] == "normal"


async def test_deleted_blob_is_put_again(server: ProcessServer, account: Account) -> None:
    machine = uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1))
    async with Agent(server, machine) as agent:
        await agent.send(changeset)
        await become(lambda: account.holds(changeset))
        await account.blobs.delete_container(container_name(machine, changeset.stamp))
        await become(lambda: account.holds(changeset))


async def test_damaged_blob_in_the_way_is_put_over(server: ProcessServer, account: Account) -> None:
    machine = uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1))
    container = account.blobs.get_container_client(container_name(machine, changeset.stamp))
    await container.create_container()
    await container.upload_blob(segment_name(1, changeset.attempt, 0), b"torn")
    await container.upload_blob(segment_name(1, changeset.attempt, 1), changeset.segments[1])
    async with Agent(server, machine) as agent:
        await agent.send(changeset)
        await become(lambda: account.holds(changeset))


async def test_cache_that_is_away_or_forgets_gets_everything_in_the_end(
    tmp_path: Path, certificates: Certificates, fragile: EmulatorProcess
) -> None:
    machine = uuid.uuid4()
    server = ProcessServer(tmp_path, certificates, fragile.connection_string).start()
    account = Account(fragile.connection_string)
    sent: list[SampleChangeset] = []
    try:
        async with Agent(server, machine) as agent:

            async def send() -> None:
                stamp = Stamp(1, len(sent) + 1)
                sent.append(make_changeset(machine, stamp, frames_per_segment=1))
                await agent.send(sent[-1])

            for _ in range(10):
                await send()
            await become(lambda: account.holds(sent[-1]))
            fragile.kill()
            for _ in range(5):
                await send()

            async def told() -> bool:
                return "cache" in (await server.health())["warnings"]

            await become(told)
            fragile.start()
            for changeset in sent:
                await become(lambda changeset=changeset: account.holds(changeset))
            await become(lambda: durable(agent, sent[-1]))
            await become(lambda: cleared(server))
    finally:
        server.kill()
        await account.close()


async def test_lost_spool_is_learnt_from_the_cache_up_to_the_first_gap(
    own_server: ProcessServer, account: Account
) -> None:
    machine = uuid.uuid4()
    sent = [make_changeset(machine, Stamp(2, number)) for number in (1, 2, 3, 4)]
    own_server.start()
    async with Agent(own_server, machine) as agent:
        for changeset in sent:
            await agent.send(changeset)
        await become(lambda: durable(agent, sent[3]))
    own_server.kill()
    own_server.spool.rename(own_server.spool.with_name("gone"))
    container = account.blobs.get_container_client(container_name(machine, Stamp(2, 3)))
    await container.delete_blob(segment_name(3, sent[2].attempt, 1))
    own_server.start()
    async with Agent(own_server, machine) as agent:
        state = (await agent.state()).state
        assert (state.committed, state.attempt) == (Stamp(2, 2), sent[1].attempt)
        assert state.durable_ns == sent[1].manifest.bookmark.time_ns
        assert (await agent.commit(sent[1])).status == 200
        assert (await agent.commit(sent[3])).told == (409, "out_of_order")
        catching_up = make_changeset(machine, Stamp(2, 4), since=2)
        await agent.send(catching_up)
        await become(lambda: account.holds(catching_up))
    own_server.kill()
    own_server.spool.rename(own_server.spool.with_name("gone_too"))
    await account.apply(machine, Stamp(2, 9))
    own_server.start()
    async with Agent(own_server, machine) as agent:
        # The watermark may be anybody's: it is passed on, and acknowledges nothing here.
        state = (await agent.state()).state
        assert (state.committed, state.durable_ns) == (NOTHING, 0)
        assert state.watermark.applied == Stamp(2, 9)
        await agent.send(make_changeset(machine, Stamp(2, 10), since=9, applied=Stamp(2, 9)))


async def test_forged_watermark_acknowledges_nothing(
    own_server: ProcessServer, account: Account
) -> None:
    machine = uuid.uuid4()
    own_server.start()
    async with Agent(own_server, machine) as agent:
        first = make_changeset(machine, Stamp(1, 1))
        await agent.send(first)
        await account.apply(machine, Stamp(5, 1000))
        await become(lambda: own_server.spooled(machine) == [])
        assert (await agent.state()).state.committed == first.stamp
        # What it made the spool drop is sent again, should the true applier miss it.
        container = account.blobs.get_container_client(container_name(machine, first.stamp))
        await container.delete_blob(manifest_name(1))
        await account.apply(machine, NOTHING, wanted=(manifest_name(1),))
        await become(lambda: fallen_back(agent, NOTHING))


async def test_segments_that_are_lost_everywhere_are_sent_again(
    own_server: ProcessServer, account: Account
) -> None:
    """Their manifest is in the cache: the spool was lost, then the cache forgot some seconds."""
    machine = uuid.uuid4()
    own_server.start()
    sent = [make_changeset(machine, Stamp(1, number)) for number in (1, 2)]
    async with Agent(own_server, machine) as agent:
        for changeset in sent:
            await agent.send(changeset)
        await become(lambda: durable(agent, sent[1]))
        await account.apply(machine, Stamp(1, 1))
        own_server.kill()
        own_server.spool.rename(own_server.spool.with_name("gone"))
        own_server.start()
        assert (await agent.state()).state.committed == Stamp(1, 2)
        name = segment_name(2, sent[1].attempt, 0)
        container = account.blobs.get_container_client(container_name(machine, Stamp(1, 2)))
        await container.delete_blob(name)
        await account.apply(machine, Stamp(1, 1), wanted=(name,))
        await become(lambda: fallen_back(agent, Stamp(1, 1)))
        again = make_changeset(machine, Stamp(1, 3), since=1, applied=Stamp(1, 1))
        await agent.send(again)
        await become(lambda: account.holds(again))


async def fallen_back(agent: Agent, stamp: Stamp) -> bool:
    return (await agent.state()).state.committed == stamp


async def test_unknown_stream_waits_for_the_cache_and_a_known_one_does_not(
    tmp_path: Path, certificates: Certificates, fragile: EmulatorProcess
) -> None:
    known, unknown = uuid.uuid4(), uuid.uuid4()
    server = ProcessServer(tmp_path, certificates, fragile.connection_string).start()
    try:
        async with Agent(server, known) as agent, Agent(server, unknown) as stranger:
            await agent.state()
            fragile.kill()
            await agent.send(make_changeset(known, Stamp(1, 1)))
            changeset = make_changeset(unknown, Stamp(1, 1))
            for reply in (
                await stranger.state(),
                await stranger.put(changeset, 0),
                await stranger.commit(changeset),
            ):
                assert reply.told == (503, "unavailable")
                assert int(reply.headers["Retry-After"]) > 0
            server.kill()
            server.start()
            assert (await agent.state()).state.committed == Stamp(1, 1)
            fragile.start()
            await stranger.send(changeset)
    finally:
        server.kill()

"""One machine that takes all it can get, beside one that wants its share."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import xxhash

from appliance.process_server.config import SPOOL_BYTES_MIN, LimitConfig
from appliance.process_server.refusal import Kind, RefusedError
from appliance.process_server.room import COMMIT_SPARE_BYTES, ENTRY_BYTES, MachineRoom, Room
from appliance.process_server.turns import Turns
from replication.bookmark import Stamp
from replication.stream import ATTEMPT_HEADER, DIGEST_HEADER, segment_path
from tests.appliance.process_server.rig import Agent, Certificates, ProcessServer
from tests.appliance.process_server.sample import SampleChangeset, make_changeset
from tests.appliance.process_server.test_durability import make_large
from tests.azure_emu.fixtures import EmulatorProcess

RPO_SECONDS_MAX = 5.0


@pytest.fixture(scope="module")
def tight_server(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates, azurite: EmulatorProcess
) -> Iterator[ProcessServer]:
    """The smallest spool; turns and attempts are few."""
    server = ProcessServer(
        tmp_path_factory.mktemp("tight_server"),
        certificates,
        azurite.connection_string,
        spool_bytes_max=SPOOL_BYTES_MIN,
        limits="segments_in_flight_max = 4\nmachine_turns_max = 2\nmachine_waiting_max = 2\n"
        "machine_attempts_max = 3\nmachine_attempt_bytes_max = 33554432",
    )
    try:
        yield server.start()
    finally:
        server.kill()


async def test_greedy_machine_does_not_take_the_modest_ones_rpo(
    tight_server: ProcessServer,
) -> None:
    """Nothing is applied, so what the greedy one has filled stays full."""
    greedy, modest = uuid.uuid4(), uuid.uuid4()
    async with Agent(tight_server, modest) as agent:
        await agent.send(make_changeset(modest, Stamp(1, 1)))
        async with Agent(tight_server, greedy) as eater:
            number, refused = 0, (0, "")
            while refused != (429, "quota"):
                number += 1
                assert number < 10
                reply = await eater.put(make_large(greedy, Stamp(1, number), 1), 0)
                if reply.status == 201:
                    continue
                refused = reply.told
                assert int(reply.headers["Retry-After"]) >= 1
            for turn in range(2, 8):
                began = time.monotonic()
                large = make_large(greedy, Stamp(1, 50), 1)
                pushing = [asyncio.create_task(eater.put(large, 0)) for _ in range(3)]
                reply = await agent.send(make_changeset(modest, Stamp(1, turn)))
                assert time.monotonic() - began < RPO_SECONDS_MAX
                assert reply.state.committed == Stamp(1, turn)
                assert {(await one).told for one in pushing} == {(429, "quota")}


async def test_changeset_that_can_never_fit_is_refused_for_good(
    tight_server: ProcessServer,
) -> None:
    machine = uuid.uuid4()
    async with Agent(tight_server, machine) as agent:
        changeset = make_large(machine, Stamp(1, 1), 3)
        statuses = [(await agent.put(changeset, index)).status for index in range(3)]
        assert statuses == [201, 201, 413]
        async with Agent(tight_server, machine) as again:
            assert "changeset_bytes_max" in (await again.put(changeset, 2)).refusal.hint


async def test_attempts_that_nobody_commits_are_bounded(tight_server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(tight_server, machine) as agent:
        begun = [make_changeset(machine, Stamp(1, number)) for number in range(1, 5)]
        for changeset in begun[:3]:
            assert (await agent.put(changeset, 0)).status == 201
        reply = await agent.put(begun[3], 0)
        assert reply.told == (429, "quota")
        assert "begun and not committed" in reply.refusal.message
        # An agent that starts anew begins below, and its old attempts make room.
        first = make_changeset(machine, Stamp(1, 1))
        assert (await agent.put(first, 0)).status == 201
        await agent.send(first)


async def test_slow_bodies_of_one_machine_leave_turns_to_others(
    tight_server: ProcessServer,
) -> None:
    slow, quick = uuid.uuid4(), uuid.uuid4()
    hold = asyncio.Event()

    async def crawl(changeset: SampleChangeset) -> int:
        async def pieces() -> AsyncIterator[bytes]:
            yield changeset.segments[0][:100]
            await hold.wait()
            yield changeset.segments[0][100:]

        headers = {
            ATTEMPT_HEADER: changeset.attempt.hex(),
            DIGEST_HEADER: xxhash.xxh3_128_hexdigest(changeset.segments[0]),
            "Content-Length": str(len(changeset.segments[0])),
        }
        path = segment_path(slow, changeset.stamp, 0)
        reply = await crawler.ask("PUT", path, pieces(), headers)
        return reply.status

    async with Agent(tight_server, slow) as crawler, Agent(tight_server, quick) as agent:
        changeset = make_changeset(slow, Stamp(1, 1))
        crawling = [asyncio.create_task(crawl(changeset)) for _ in range(6)]
        await asyncio.wait(crawling, return_when=asyncio.FIRST_COMPLETED)  # one too many waits
        began = time.monotonic()
        await agent.send(make_changeset(quick, Stamp(1, 1)))
        assert time.monotonic() - began < RPO_SECONDS_MAX
        hold.set()
        assert sorted(await asyncio.gather(*crawling))[-2:] == [429, 429]


async def test_turns_are_given_back_and_forgotten() -> None:
    limits = LimitConfig(segments_in_flight_max=2, machine_turns_max=1, machine_waiting_max=0)
    turns, machine = Turns(limits), uuid.uuid4()
    for _ in range(3):
        async with turns.take(machine):
            with pytest.raises(RefusedError, match="under way") as told:
                async with turns.take(machine):
                    raise AssertionError
            assert told.value.kind is Kind.QUOTA
            async with turns.take(uuid.uuid4()):
                pass
    assert not turns._queues


def test_manifests_alone_do_not_fill_the_disk() -> None:
    part = 1 << 20
    own = MachineRoom(Room(part))
    size_bytes = 4 << 20
    while own.taken_bytes + size_bytes + ENTRY_BYTES <= part + COMMIT_SPARE_BYTES:
        own.check_commit(size_bytes, part)
        own.take(size_bytes)
    with pytest.raises(RefusedError, match="no room for a manifest"):
        own.check_commit(size_bytes, part)

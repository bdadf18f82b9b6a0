"""The sums in the cache go to the machine that they are of, as they lie there, and nowhere else."""

import uuid

import pytest

from appliance.process_server.cache_account import open_cache_account
from appliance.process_server.config import CacheConfig
from replication.cache_layout import sums_container, sums_name
from replication.stream import sums_path
from replication.sums import SUMS_BYTES_MAX
from tests.appliance.process_server.rig import Agent, ProcessServer
from tests.azure_emu.fixtures import EmulatorProcess

API_VERSION = CacheConfig.model_fields["api_version"].default


async def put(azurite: EmulatorProcess, machine: uuid.UUID, name: str, content: bytes) -> None:
    async with open_cache_account(
        azurite.connection_string, api_version=API_VERSION, connections_max=2
    ) as cache:
        await cache.put(sums_container(machine, 3), name, content)


async def test_a_part_is_handed_over_as_it_is(
    server: ProcessServer, azurite: EmulatorProcess
) -> None:
    machine = uuid.uuid4()
    content = bytes(range(256)) * 100
    async with Agent(server, machine) as agent:
        path = sums_path(machine, 3, 1, 2, 7)
        assert (await agent.ask("GET", path)).told == (404, "not_found")
        await put(azurite, machine, sums_name(1, 2, 7), content)
        reply = await agent.ask("GET", path)
        assert (reply.status, reply.body) == (200, content)
        for other in ((4, 1, 2, 7), (3, 0, 2, 7), (3, 1, 1, 7), (3, 1, 2, 8)):
            assert (await agent.ask("GET", sums_path(machine, *other))).told[0] == 404


async def test_another_machine_gets_nothing(
    server: ProcessServer, azurite: EmulatorProcess
) -> None:
    machine = uuid.uuid4()
    await put(azurite, machine, sums_name(0, 1, 0), b"sums")
    async with Agent(server, uuid.uuid4()) as stranger:
        reply = await stranger.ask("GET", sums_path(machine, 3, 0, 1, 0))
        assert reply.told == (403, "forbidden")


async def test_a_blob_that_is_too_large_is_not_read(
    server: ProcessServer, azurite: EmulatorProcess
) -> None:
    machine = uuid.uuid4()
    await put(azurite, machine, sums_name(0, 1, 0), bytes(SUMS_BYTES_MAX + 1))
    async with Agent(server, machine) as agent:
        reply = await agent.ask("GET", sums_path(machine, 3, 0, 1, 0))
        assert reply.told == (507, "storage")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("generations/0/sums/0/1/0", 400),
        ("generations/4294967296/sums/0/1/0", 400),
        ("generations/1/sums/64/1/0", 400),
        ("generations/1/sums/0/0/0", 400),
        ("generations/1/sums/0/3/0", 400),
        ("generations/1/sums/0/1/99999999999", 400),
        ("generations/1/sums/00/1/0", 404),
        ("generations/1/sums/0/1/0/", 404),
        ("generations/1/sums/0/1/../../0", 404),
    ],
)
async def test_what_addresses_no_part_is_refused(
    server: ProcessServer, path: str, status: int
) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        raw = f"GET /v1/machines/{machine}/{path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await agent.exchange(raw.encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())

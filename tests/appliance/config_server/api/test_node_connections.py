"""How many connections a node can hold, and that a refused one holds none."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from appliance.config_server.api.peer import Peer
from appliance.config_server.store.schema import Certificate
from replication.control.role import NodeRole
from tests.appliance.config_server.running import open_rig
from tests.appliance.config_server.serving import Port, open_port

NODE_MAX = 3
LIMITS: dict[str, Any] = {
    "requests_per_second": 10_000,
    "requests_burst": 10_000,
    "header_seconds_max": 20,
    "idle_seconds_max": 20,
    "connections_max": 8,
    "connections_per_node_max": NODE_MAX,
}
ASK = b"GET /api/v1/node/assignment HTTP/1.1\r\nhost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def open_all(folder: Path) -> AsyncIterator[Port]:
    async with open_rig(folder, limits=LIMITS) as rig, open_port(rig, folder) as port:
        yield port


@contextlib.asynccontextmanager
async def wire(
    port: Port, certificate: Path
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    context = port.authority.client_context(certificate)
    reader, writer = await asyncio.open_connection("localhost", port.number, ssl=context)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def revoke(port: Port, peer: Peer) -> None:
    async with port.rig.server.database.writing() as session:
        await session.execute(
            update(Certificate)
            .where(Certificate.serial == peer.serial)
            .values(revoked_ns=port.rig.clock())
        )


@pytest.fixture(autouse=True)
def _brief_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.config_server.api.listener.TLS_SHUTDOWN_SECONDS_MAX", 0.3)


@pytest.mark.parametrize("is_revoked", [False, True])
async def test_a_node_cannot_take_the_connections_of_others(
    tmp_path: Path, is_revoked: bool
) -> None:
    async with open_all(tmp_path) as port:
        peer, greedy = await port.enrol(NodeRole.MACHINE)
        _, other = await port.enrol(NodeRole.MACHINE)
        if is_revoked:
            await revoke(port, peer)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(NODE_MAX):
                await stack.enter_async_context(wire(port, greedy))
            for _ in range(2 * LIMITS["connections_max"]):
                reader, _ = await stack.enter_async_context(wire(port, greedy))
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), 5) == b"", "it is let go at once"
            async with port.client(certificate=other) as node, port.client() as anyone:
                assert (await node.get("node/assignment")).status_code == 200
                assert (await anyone.get("healthz")).status_code == 200
        async with port.client(certificate=greedy) as again:
            for _ in range(40):
                with contextlib.suppress(httpx.TransportError):
                    answer = await again.get("healthz")
                    break
                await asyncio.sleep(0.05)
            assert answer.status_code == 200, "those that are closed do not count"


@pytest.mark.parametrize("refused", [401, 403])
async def test_a_node_that_is_refused_is_let_go(tmp_path: Path, refused: int) -> None:
    async with open_all(tmp_path) as port:
        peer, certificate = await port.enrol(NodeRole.MACHINE)
        other, _ = await port.enrol(NodeRole.MACHINE)
        asked = ASK
        async with wire(port, certificate) as (reader, writer):
            writer.write(asked)
            assert b" 200 " in await asyncio.wait_for(reader.readline(), 5)
            if refused == 401:
                await revoke(port, peer)
            else:
                asked = ASK.replace(b"assignment", b"data-keys/%s" % str(other.node).encode())
            writer.write(asked)
            rest = await asyncio.wait_for(reader.read(), 5)
            assert b"HTTP/1.1 %d " % refused in rest
            assert rest.count(b"connection: close") == 1


async def test_an_operator_who_is_refused_keeps_the_connection(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port, port.client() as operator:
        answer = await operator.get("me")
        assert (answer.status_code, answer.headers.get("connection")) == (401, None)

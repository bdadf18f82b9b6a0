"""The HTTPS port itself: who is at the other end, limits of time and size, its end."""

import asyncio
import contextlib
import json
import re
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from sqlalchemy import update

from appliance.config_server.api.access import anyone, needs_node
from appliance.config_server.api.connection import HEADER_BYTES_MAX
from appliance.config_server.api.limiting import BODY_BYTES_MAX
from appliance.config_server.api.listener import listen
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.config import ListenConfig
from appliance.config_server.store.schema import Certificate
from replication.control.role import NodeRole, OperatorRole
from replication.errors import ConfigError
from tests.appliance.config_server.running import Rig, open_rig
from tests.appliance.config_server.serving import Authority, Port, open_port

LIMITS: dict[str, Any] = {
    "requests_per_second": 10_000,
    "requests_burst": 10_000,
    "header_seconds_max": 0.5,
    "body_seconds_max": 0.7,
    "idle_seconds_max": 0.6,
    "connections_per_source_max": 8,
}

_extra = Router("test")


@_extra.get("/whoami")
async def _whoami(caller: Annotated[Caller, needs_node()]) -> dict[str, str]:
    return {"name": caller.name, "role": str(caller.role), "serial": caller.serial}


@_extra.post("/echo", dependencies=[anyone()])
async def _echo(body: dict[str, Any]) -> int:
    return len(body)


@_extra.get("/wait", dependencies=[anyone()])
async def _wait(server: ServerOf) -> str:
    await server.stop.wait()
    return "stopped"


@_extra.get("/hang", dependencies=[anyone()])
async def _hang() -> str:
    await asyncio.sleep(60)
    return "late"


@contextlib.asynccontextmanager
async def open_all(folder: Path, **limits: Any) -> AsyncIterator[Port]:
    async with open_rig(folder, limits={**LIMITS, **limits}) as rig:
        rig.app.router.routes.extend(_extra.routes)
        async with open_port(rig, folder) as port:
            yield port


@pytest.fixture(autouse=True)
def _brief_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.config_server.api.connection.LINGER_SECONDS", 0.1)
    monkeypatch.setattr("appliance.config_server.api.listener.TLS_SHUTDOWN_SECONDS_MAX", 0.3)


def _document(raw: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


async def test_a_certificate_says_who_the_node_is(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port:
        peer, path = await port.enrol(NodeRole.APPLIER)
        async with port.client(certificate=path) as node:
            assert (await node.get("test/whoami")).json() == {
                "name": str(peer.node),
                "role": "applier",
                "serial": peer.serial,
            }


async def test_revocation_takes_effect_within_an_open_connection(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port:
        peer, path = await port.enrol(NodeRole.MACHINE)
        async with port.client(certificate=path) as node:
            assert (await node.get("test/whoami")).status_code == 200
            async with port.rig.server.database.writing() as session:
                await session.execute(
                    update(Certificate)
                    .where(Certificate.serial == peer.serial)
                    .values(revoked_ns=port.rig.clock())
                )
            refused = await node.get("test/whoami")
        assert (refused.status_code, refused.json()["code"]) == (401, "unauthenticated")


async def test_a_certificate_ends_within_an_open_connection(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port:
        _, path = await port.enrol(NodeRole.MACHINE)
        async with port.client(certificate=path) as node:
            assert (await node.get("test/whoami")).status_code == 200
            port.rig.clock.ahead_ns = 2 * 86400 * 10**9
            assert (await node.get("test/whoami")).status_code == 401


async def test_a_certificate_of_another_ca_is_no_connection(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port:
        stranger = Authority.create(tmp_path / "other").issue("x", "applier")
        async with port.client(certificate=stranger) as node:
            with pytest.raises(httpx.TransportError):
                await node.get("healthz")


async def test_a_certificate_of_no_node_is_nobody(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port:
        path = port.authority.issue("not a UUID", "applier")
        async with port.client(certificate=path) as node:
            assert (await node.get("test/whoami")).status_code == 401
            assert (await node.get("healthz")).status_code == 200


async def test_tls_1_2_is_refused(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port:
        context = port.authority.client_context()
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await asyncio.open_connection("localhost", port.number, ssl=context)


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /api/v1/healthz HTTP/1.1\r\nhost: x\r\nx: " + b"a" * (4 * HEADER_BYTES_MAX),
        b"GET /" + b"a" * (4 * HEADER_BYTES_MAX) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: bcdefgh\r\n" * (HEADER_BYTES_MAX // 4) + b"\r\n",
    ],
    ids=["one field without end", "the path", "many fields"],
)
async def test_a_huge_header_is_refused(tmp_path: Path, sent: bytes) -> None:
    async with open_all(tmp_path) as port, port.wire() as (reader, writer):
        writer.write(sent)
        status, document = _document(await reader.read())
        assert (status, document["code"]) == (431, "too_large")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01 nonsense\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nhost: x\r\n\r\n",
        b"CONNECT host:1 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /api/v1/test/echo HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /api/v1/test/echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=["no HTTP", "not ASCII", "CONNECT", "negative length", "two lengths", "bad chunk"],
)
async def test_what_is_no_request_is_told_so_in_the_api_s_shape(
    tmp_path: Path, sent: bytes
) -> None:
    async with open_all(tmp_path) as port, port.wire() as (reader, writer):
        writer.write(sent)
        status, document = _document(await reader.read())
        assert status == 400
        assert set(document) == {"code", "message", "hint", "details"}


async def test_a_header_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port, port.wire() as (reader, writer):
        started = time.monotonic()
        writer.write(b"GET /api/v1/healthz HTTP/1.1\r\nhost")
        status, _ = _document(await reader.read())
        assert status == 408
        assert time.monotonic() - started < 3


async def test_a_connection_without_a_request_is_closed(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port, port.wire() as (reader, _):
        assert await asyncio.wait_for(reader.read(), 3) == b""


async def test_a_slow_body_is_not_waited_for(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port, port.wire() as (reader, writer):
        writer.write(
            b"POST /api/v1/test/echo HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n"
        )
        reading = asyncio.create_task(reader.read())
        for _ in range(30):
            writer.write(b" ")
            await asyncio.sleep(0.1)
            if reading.done():
                break
        status, document = _document(await asyncio.wait_for(reading, 1))
        assert (status, document["code"]) == (408, "too_slow")


async def test_a_slow_body_that_nobody_reads_is_not_waited_for_either(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port, port.wire() as (reader, writer):
        writer.write(b"GET /api/v1/healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        reading = asyncio.create_task(reader.read())
        for _ in range(30):
            writer.write(b" ")
            await asyncio.sleep(0.1)
            if reading.done():
                break
        assert (await asyncio.wait_for(reading, 1)).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_beyond_the_limit_is_refused(tmp_path: Path, chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(BODY_BYTES_MAX // 65536 + 2):
            yield b" " * 65536

    async with open_all(tmp_path) as port, port.client() as client:
        content = pieces() if chunked else b" " * (BODY_BYTES_MAX + 1)
        headers = {"content-type": "application/json"}
        told = await client.post("test/echo", content=content, headers=headers)
        assert (told.status_code, told.json()["code"]) == (413, "too_large")


async def test_the_largest_body_is_taken(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port, port.client() as client:
        body = b'{"a":1}'.ljust(BODY_BYTES_MAX)
        headers = {"content-type": "application/json"}
        assert (await client.post("test/echo", content=body, headers=headers)).json() == 1


async def test_a_source_has_only_so_many_connections_but_nodes_have_theirs(tmp_path: Path) -> None:
    async with open_all(tmp_path, header_seconds_max=20, idle_seconds_max=20) as port:
        _, path = await port.enrol(NodeRole.MACHINE)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(LIMITS["connections_per_source_max"]):
                await stack.enter_async_context(port.wire())
            async with port.client() as one_more, port.client(certificate=path) as node:
                with pytest.raises(httpx.TransportError):
                    await one_more.get("healthz")
                assert (await node.get("healthz")).status_code == 200
        async with port.client() as client:
            for _ in range(20):
                with contextlib.suppress(httpx.TransportError):
                    if (await client.get("healthz")).status_code == 200:
                        break
                await asyncio.sleep(0.05)
            assert (await client.get("healthz")).status_code == 200


async def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    one = b"GET /api/v1/%s HTTP/1.1\r\nhost: x\r\n%s\r\n"
    async with open_all(tmp_path) as port, port.wire() as (reader, writer):
        writer.write(one % (b"healthz", b"") + one % (b"nope", b"connection: close\r\n"))
        raw = await reader.read()
        assert re.findall(rb"HTTP/1.1 (\d+)", raw) == [b"200", b"404"]


async def test_a_long_poll_ends_with_the_daemon(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        waiting = await _asked(rig, tmp_path, "test/wait")
        assert (await waiting).json() == "stopped"


async def test_a_request_that_hangs_does_not_keep_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.config_server.api.listener.DRAIN_SECONDS_MAX", 0.3)
    async with open_rig(tmp_path) as rig:
        started = time.monotonic()
        hanging = await _asked(rig, tmp_path, "test/hang")
        with pytest.raises(httpx.TransportError):
            await hanging
        assert time.monotonic() - started < 5


async def _asked(rig: Rig, folder: Path, path: str) -> "asyncio.Task[httpx.Response]":
    """A request that is under way while the port is closed."""
    rig.app.router.routes.extend(_extra.routes)
    async with open_port(rig, folder) as port:
        client = port.client(timeout=20)
        asking = asyncio.create_task(client.get(path))
        await asyncio.sleep(0.4)
        rig.server.stop.set()
    return asking


async def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port:
        where = ListenConfig(host="127.0.0.1", port=port.number)
        context = port.authority.server_context()
        with pytest.raises(ConfigError, match=str(port.number)):
            async with listen(port.rig.app, context, where, port.rig.server.config.limits):
                pass


async def test_responses_carry_the_date_and_are_not_kept(tmp_path: Path) -> None:
    async with open_all(tmp_path) as port, port.client() as client:
        headers = (await client.get("me")).headers
        assert headers["cache-control"] == "no-store"
        assert headers["date"].endswith("GMT")
        assert "server" not in headers
        assert port.rig.tokens[OperatorRole.READER] not in str(headers)

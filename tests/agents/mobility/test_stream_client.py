"""Requests against a real TLS server that misbehaves by script."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash
from aiohttp import web

from agents.mobility import stream_client
from agents.mobility.config import SendConfig
from agents.mobility.frame_builder import Segment
from agents.mobility.stream_client import CORRUPTED_TRIES_MAX, Pace, StreamClient
from daemon.tls import TlsFiles
from replication.bookmark import NOTHING, Stamp
from replication.control.role import NodeRole
from replication.errors import CaptureError, OutOfOrderError, PeerError
from replication.manifest import SegmentEntry
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Repair, RepairRun, Watermark
from tests.agents.mobility.script_server import (
    Answer,
    Authority,
    ScriptServer,
    hang_up,
    never_read,
    refuse,
    running,
)

MACHINE = uuid.UUID(int=8)
STAMP = Stamp(1, 4)


def segment_of(data: bytes, index: int = 0) -> Segment:
    return Segment(index, SegmentEntry(1, len(data), xxhash.xxh3_128_digest(data)), data)


@dataclass
class Rig:
    server: ScriptServer
    tls: TlsFiles
    troubles: list[str]
    stopping: asyncio.Event

    def client(
        self, tls: TlsFiles | None = None, server_unit: str = "", **changes: object
    ) -> StreamClient:
        settings = {"backoff_seconds_max": 0.05, "request_seconds_max": 5.0} | changes
        return StreamClient(
            self.server.origin,
            MACHINE,
            tls or self.tls,
            SendConfig.model_validate(settings),
            stopping=self.stopping,
            on_trouble=self.troubles.append,
            server_unit=server_unit,
        )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_client, "BACKOFF_SECONDS_MIN", 0.01)
    monkeypatch.setattr(stream_client, "LOOK_SECONDS", 0.05)


@pytest.fixture
async def rig(tmp_path: Path, quick: None) -> AsyncIterator[Rig]:
    authority = Authority(tmp_path, "ca")
    async with running(authority.issue("localhost")) as server:
        yield Rig(server, authority.issue(str(MACHINE)), [], asyncio.Event())


async def test_a_server_that_is_no_process_server_gets_nothing(rig: Rig) -> None:
    """Under a config server all servers have certificates of one CA."""
    async with rig.client(server_unit=NodeRole.PROCESS_SERVER) as client:
        asking = asyncio.create_task(client.state())
        while not rig.troubles:  # noqa: ASYNC110 - a plain list, no event
            await asyncio.sleep(0.01)
        rig.stopping.set()
        with pytest.raises(CaptureError):
            await asking
    assert "not that of a process server" in rig.troubles[0]
    assert rig.server.paths == []


DATA = bytes(range(256)) * 20_000
PATH = f"/v1/machines/{MACHINE}/generations/1/changesets/4/segments/0"


@pytest.mark.parametrize(
    "script",
    [
        [],
        [refuse(429, retry_after="0"), refuse(429, retry_after="soon")],
        [refuse(429, read=False), refuse(503), refuse(408), refuse(507)],
        [hang_up, hang_up],
        [refuse(422)] * (CORRUPTED_TRIES_MAX - 1),
        [refuse(500), hang_up, refuse(422), refuse(502)],
    ],
    ids=["no trouble", "full", "away", "broken off", "corrupted", "all"],
)
async def test_segment_arrives_whatever_happens_on_the_way(rig: Rig, script: list[Answer]) -> None:
    rig.server.script = list(script)
    async with rig.client() as client:
        await client.put_segment(STAMP, b"a" * 16, segment_of(DATA))
    assert rig.server.stored == {PATH: DATA}
    assert len(rig.server.paths) == len(script) + 1
    assert len([trouble for trouble in rig.troubles if trouble]) == len(script)
    assert rig.troubles[-1] == ""


async def test_process_server_says_how_long_to_wait(rig: Rig) -> None:
    rig.server.script = [refuse(429, retry_after="1", text="the spool is full")]
    async with rig.client() as client:
        began = time.monotonic()
        await client.put_segment(STAMP, b"a" * 16, segment_of(DATA))
    assert 1.0 <= time.monotonic() - began < 3.0
    assert "the spool is full" in rig.troubles[0]


@pytest.mark.parametrize(
    ("script", "error", "match"),
    [
        ([refuse(409, text="stale")], OutOfOrderError, "stale.*do this"),
        ([refuse(403, text="not yours")], PeerError, "not yours"),
        ([refuse(413)], PeerError, "do this"),
        ([refuse(422)] * CORRUPTED_TRIES_MAX, PeerError, "memory"),
    ],
)
async def test_refusals_that_no_retry_mends_are_told(
    rig: Rig, script: list[Answer], error: type[Exception], match: str
) -> None:
    rig.server.script = list(script)
    async with rig.client() as client:
        with pytest.raises(error, match=match):
            await client.put_segment(STAMP, b"a" * 16, segment_of(DATA))
    assert len(rig.server.paths) == len(script)


async def test_refusal_without_words_and_redirects_are_told(rig: Rig) -> None:
    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "https://localhost/"}, text="<html>")

    rig.server.script = [page]
    async with rig.client() as client:
        with pytest.raises(PeerError, match="HTTP status 302"):
            await client.state()


def big_state() -> StreamState:
    runs = tuple(RepairRun(0, 10 * number, 3) for number in range(4000))
    return StreamState(NOTHING, NO_ATTEMPT, 0, 0, Watermark(MACHINE, repair=Repair(1, runs)))


async def test_answer_that_comes_in_pieces_is_read_whole(rig: Rig) -> None:
    body = big_state().to_bytes()

    async def in_pieces(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        for offset in range(0, len(body), 40_000):
            await response.write(body[offset : offset + 40_000])
            await asyncio.sleep(0.02)
        return response

    rig.server.script = [in_pieces, in_pieces]
    async with rig.client() as client:
        assert await client.state() == big_state()
        assert await client.commit(STAMP, b"manifest") == big_state()


async def test_answer_that_never_ends_is_cut(rig: Rig) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(1 << 16))

    rig.server.script = [endless]
    async with rig.client() as client:
        with pytest.raises(PeerError):
            await asyncio.wait_for(client.state(), 10)


async def slow(request: web.Request) -> web.StreamResponse:
    await request.read()
    await asyncio.sleep(60)
    raise AssertionError


@pytest.mark.parametrize("hanging", [slow, never_read], ids=["answer", "body"])
async def test_process_server_that_hangs_is_asked_again(rig: Rig, hanging: Answer) -> None:
    rig.server.script = [hanging]
    data = DATA * 6  # more than the sockets hold
    async with rig.client(request_seconds_max=0.5) as client:
        await asyncio.wait_for(client.put_segment(STAMP, b"a" * 16, segment_of(data)), 20)
    assert rig.server.stored == {PATH: data}
    assert any(rig.troubles)


async def test_slow_link_is_no_hanging_process_server(rig: Rig) -> None:
    """The limit of a request counts while nothing moves; sending as slowly as asked is fine."""
    async with rig.client(
        request_seconds_max=0.3, bandwidth_bytes_per_second_max=len(DATA)
    ) as client:
        began = time.monotonic()
        await client.put_segment(STAMP, b"a" * 16, segment_of(DATA))
    assert time.monotonic() - began > 0.7
    assert rig.troubles == [""]


@pytest.mark.parametrize(
    "obstacle",
    [refuse(429, retry_after="60"), slow, never_read],
    ids=["told to wait", "no answer", "no reader"],
)
async def test_stop_ends_every_waiting_at_once(rig: Rig, obstacle: Answer) -> None:
    rig.server.always = obstacle
    async with rig.client() as client:
        putting = asyncio.create_task(client.put_segment(STAMP, b"a" * 16, segment_of(DATA * 6)))
        await rig.server.arrived.wait()
        await asyncio.sleep(0.1)
        assert not putting.done()
        began = time.monotonic()
        rig.stopping.set()
        with pytest.raises(CaptureError, match="stopping"):
            await putting
        assert time.monotonic() - began < 0.5
        with pytest.raises(CaptureError, match="stopping"):
            await client.state()


async def test_stop_ends_sending_at_a_low_rate(rig: Rig) -> None:
    async with rig.client(bandwidth_bytes_per_second_max=1000) as client:
        putting = asyncio.create_task(client.put_segment(STAMP, b"a" * 16, segment_of(DATA)))
        await asyncio.sleep(0.3)
        rig.stopping.set()
        with pytest.raises(CaptureError):
            await asyncio.wait_for(putting, 1)


@pytest.mark.parametrize("whose", ["server", "client", "name"])
async def test_certificate_that_does_not_fit_is_told_and_tried_again(
    rig: Rig, tmp_path: Path, whose: str
) -> None:
    other = Authority(tmp_path, "other")
    if whose == "name":
        rig.server.origin = rig.server.origin.replace("localhost", "127.0.0.1")
        tls = rig.tls
    else:
        wrong = other.issue(str(MACHINE))
        tls = (
            rig.tls.model_copy(update={"ca": wrong.ca})
            if whose == "server"
            else wrong.model_copy(update={"ca": rig.tls.ca})
        )
    async with rig.client(tls) as client:
        asking = asyncio.create_task(client.state())
        deadline = time.monotonic() + 20
        while len(rig.troubles) < 3:
            await asyncio.sleep(0.01)
            assert time.monotonic() < deadline
        assert not asking.done()
        rig.stopping.set()
        with pytest.raises(CaptureError):
            await asking
    assert rig.server.paths == []
    if whose != "client":
        assert "certificate that does not fit" in rig.troubles[0]


async def test_process_server_that_is_away_is_waited_for(rig: Rig) -> None:
    origin = rig.server.origin
    rig.server.origin = "https://localhost:1"
    async with rig.client() as client:
        asking = asyncio.create_task(client.state())
        while not rig.troubles:  # noqa: ASYNC110 - the callback is no coroutine's
            await asyncio.sleep(0.01)
        assert "localhost:1" in rig.troubles[0]
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking
    rig.server.origin = origin


async def test_bandwidth_is_kept_over_all_requests_together(rig: Rig) -> None:
    rate = 8 << 20
    async with rig.client(bandwidth_bytes_per_second_max=rate) as client:
        began = time.monotonic()
        await asyncio.gather(
            *(
                client.put_segment(STAMP, b"a" * 16, segment_of(bytes(4 << 20), number))
                for number in range(3)
            )
        )
        took = time.monotonic() - began
    assert (12 << 20) / rate * 0.9 - 0.1 <= took < 5


async def test_pace_lets_no_burst_through_after_a_rest() -> None:
    pace = Pace(1_000_000)
    await asyncio.sleep(0.3)
    began = time.monotonic()
    for _ in range(4):
        await pace.spend(100_000)
    assert 0.25 <= time.monotonic() - began < 2


async def test_pace_without_a_limit_waits_for_nothing() -> None:
    began = time.monotonic()
    for _ in range(1000):
        await Pace(0).spend(1 << 30)
    assert time.monotonic() - began < 0.5

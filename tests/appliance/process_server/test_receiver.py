"""What the server answers, over real TLS, to agents and to those who are none."""

import asyncio
import socket
import ssl
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from daemon.tls import client_context
from replication.bookmark import NOTHING, Stamp
from replication.stream import commit_path, segment_path
from tests.appliance.process_server.rig import (
    TLS_ERRORS,
    Agent,
    Certificates,
    ProcessServer,
    become,
    tls_files,
)
from tests.appliance.process_server.sample import SampleChangeset, make_changeset

MACHINE = uuid.UUID("6f1c1a0e-93a4-4c0e-9f57-0d4b8a1c2e3f")
ROOT = f"/v1/machines/{MACHINE}"


async def test_committed_changeset_is_told_in_the_state(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        state = (await agent.state()).state
        assert (state.committed, state.watermark.applied) == (NOTHING, NOTHING)
        first = make_changeset(machine, Stamp(1, 1))
        assert [(await agent.put(first, i)).status for i in (0, 1)] == [201, 201]
        assert (await agent.state()).state.committed == NOTHING
        reply = await agent.commit(first)
        assert reply.status == 201
        assert reply.state.committed == Stamp(1, 1)
        assert reply.state.attempt == first.attempt
        assert (await agent.commit(first)).status == 200
        assert (await agent.put(first, 1)).status == 200


async def test_changeset_without_segments_is_committed(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        heartbeat = make_changeset(machine, Stamp(1, 1), segment_count=0)
        assert (await agent.commit(heartbeat)).status == 201


async def test_same_segment_is_fine_and_other_bytes_are_a_conflict(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        changeset = make_changeset(machine, Stamp(1, 1))
        assert (await agent.put(changeset, 0)).status == 201
        assert (await agent.put(changeset, 0)).status == 200
        other = await agent.put(changeset, 0, body=changeset.segments[1])
        assert other.told == (409, "conflict")
        assert (await agent.put(changeset, 0)).status == 200
        await agent.send(changeset)
        other = await agent.put(changeset, 0, body=changeset.segments[1])
        assert other.told == (409, "conflict")


def hear(server: ProcessServer, context: ssl.SSLContext) -> bytes:
    """What the server answers to a request over ``context``; nothing if it hangs up."""
    address = ("127.0.0.1", server.port)
    try:
        with (
            socket.create_connection(address, timeout=10.0) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return connection.recv(100)
    except (ssl.SSLError, ConnectionError):
        return b""


def test_client_without_certificate_is_not_heard(server: ProcessServer) -> None:
    tls = server.certificates.of_machine(MACHINE)
    assert hear(server, ssl.create_default_context(cafile=tls.ca)) == b""
    assert hear(server, client_context(tls)).startswith(b"HTTP/1.1 404 ")


def test_tls_below_1_3_is_not_spoken(server: ProcessServer) -> None:
    context = client_context(server.certificates.of_machine(MACHINE))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert hear(server, context) == b""


async def test_certificate_of_another_authority_is_not_heard(
    server: ProcessServer, tmp_path: Path
) -> None:
    machine = uuid.uuid4()
    foreign = Certificates(tmp_path).of_machine(machine)
    own = server.certificates.of_machine(machine)
    tls = foreign.model_copy(update={"ca": own.ca})
    async with Agent(server, machine, tls) as agent:
        with pytest.raises(TLS_ERRORS):
            await agent.state()


async def test_stream_of_another_machine_is_forbidden(server: ProcessServer) -> None:
    machine, other = uuid.uuid4(), uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1))
    tls = server.certificates.of_machine(other)
    async with Agent(server, machine, tls) as intruder, Agent(server, machine) as agent:
        for reply in (
            await intruder.put(changeset, 0),
            await intruder.commit(changeset),
            await intruder.state(),
        ):
            assert reply.told == (403, "forbidden")
        assert (await agent.commit(changeset)).told == (409, "out_of_order")
    server_tls = tls_files(Path(server.certificates.of_server().certificate).parent)
    async with Agent(server, machine, server_tls) as intruder:
        assert (await intruder.state()).told == (403, "forbidden")


def flip(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda body: body[:offset] + value + body[offset + len(value) :]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (flip(0, b"USF2"), "a frame starts with"),
        (flip(4, b"\x02"), "version 2"),
        (flip(6, b"\x40"), "disk 64"),
        (flip(8, b"\xff"), "was expected"),
        (flip(24, b"\x09"), "was expected"),
        (flip(28, b"\x05\x00"), "frame 1 comes where 6 was expected"),
        (flip(32, b"\x09"), "was expected"),
        (flip(40, b"\x00\x00\x00"), "was expected"),
        (flip(56, b"\xff\xff\xff\xff"), "extents"),
        (flip(60, b"\x00\x00\x00\xff"), "bytes of data"),
        (flip(64, b"\xff\xff\xff\xff"), "sealed bytes"),
        (lambda body: body[:-1], "bytes into a frame"),
        (lambda body: body + b"USF1", "bytes into a frame"),
        (lambda _: b"", "at least one frame"),
    ],
)
async def test_malformed_segment_is_refused(
    server: ProcessServer, change: Callable[[bytes], bytes], told: str
) -> None:
    machine = uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1), segment_count=1)
    async with Agent(server, machine) as agent:
        reply = await agent.put(changeset, 0, body=change(changeset.segments[0]))
        assert reply.told == (400, "peer")
        assert told in reply.refusal.message
        assert server.spooled(machine) == []


async def test_segment_that_was_altered_on_its_way_is_refused(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1))
    async with Agent(server, machine) as agent:
        body = bytearray(changeset.segments[0])
        body[-1] ^= 1
        reply = await agent.put(changeset, 0, body=bytes(body), digest=bytes(16))
        assert reply.told == (422, "integrity")
        assert server.spooled(machine) == []


async def test_segment_needs_attempt_and_digest(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1))
    async with Agent(server, machine) as agent:
        assert (await agent.put(changeset, 0, digest=b"\x01")).told == (400, "peer")
        assert (await agent.put(changeset, 0, attempt=b"")).told == (400, "peer")


async def test_commit_needs_its_segments_as_the_manifest_lists_them(
    server: ProcessServer,
) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        changeset = make_changeset(machine, Stamp(1, 1))
        await agent.put(changeset, 1)
        reply = await agent.commit(changeset)
        assert reply.told == (409, "out_of_order")
        assert "lacks 1 of 2 segments: 0" in reply.refusal.message
        await agent.put(changeset, 0, body=changeset.segments[1])
        assert (await agent.commit(changeset)).told == (400, "peer")
        assert (await agent.state()).state.committed == NOTHING


@pytest.mark.parametrize(
    "change",
    [flip(0, b"USM2"), flip(4, b"\x02"), flip(8, b"\x00\x00\x00\x7f"), lambda body: body[:-1]],
)
async def test_malformed_manifest_is_refused(
    server: ProcessServer, change: Callable[[bytes], bytes]
) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        changeset = make_changeset(machine, Stamp(1, 1))
        await agent.put_all(changeset)
        reply = await agent.commit(changeset, change(changeset.content))
        assert reply.told == (400, "peer")
        assert (await agent.commit(changeset)).status == 201


async def test_manifest_of_another_changeset_is_refused(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        first = make_changeset(machine, Stamp(1, 1))
        for stranger in (
            make_changeset(machine, Stamp(1, 2)),
            make_changeset(machine, Stamp(2, 1)),
            make_changeset(uuid.uuid4(), Stamp(1, 1)),
        ):
            assert (await agent.commit(first, stranger.content)).told == (400, "peer")


async def test_gap_and_stale_generation_say_what_was_expected(server: ProcessServer) -> None:
    machine = uuid.uuid4()

    async def refused(agent: Agent, changeset: SampleChangeset) -> str:
        reply = await agent.commit(changeset)
        assert reply.told == (409, "out_of_order")
        return reply.refusal.message

    async with Agent(server, machine) as agent:
        await agent.send(make_changeset(machine, Stamp(1, 1)))
        told = await refused(agent, make_changeset(machine, Stamp(1, 3), since=2))
        assert "at most 1 was expected" in told
        await agent.send(make_changeset(machine, Stamp(1, 3), since=1))
        told = await refused(agent, make_changeset(machine, Stamp(1, 2)))
        assert "a number above 3 was expected" in told
        assert "another manifest" in await refused(agent, make_changeset(machine, Stamp(1, 3)))
        told = await refused(agent, make_changeset(machine, Stamp(2, 4)))
        assert "0 was expected" in told
        await agent.send(make_changeset(machine, Stamp(2, 1)))
        told = await refused(agent, make_changeset(machine, Stamp(1, 4)))
        assert "generation 1 is stale: 2 was expected" in told
        reply = await agent.put(make_changeset(machine, Stamp(1, 4)), 0)
        assert reply.told == (409, "out_of_order")


async def test_what_the_agent_knows_to_be_applied_counts(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        changeset = make_changeset(machine, Stamp(3, 8), since=7, applied=Stamp(3, 7))
        assert (await agent.send(changeset)).state.committed == Stamp(3, 8)


async def test_commit_drops_other_attempts_and_older_leftovers(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        older = make_changeset(machine, Stamp(1, 1))
        abandoned = make_changeset(machine, Stamp(1, 2), since=0)
        later = make_changeset(machine, Stamp(1, 3))
        taken = make_changeset(machine, Stamp(1, 2), since=0)
        for changeset in (older, abandoned, later, taken):
            await agent.put_all(changeset)
        await agent.commit(taken)
        left = {path.split("/")[2] for path in server.spooled(machine)}
        assert left == {taken.attempt.hex(), later.attempt.hex()}
        assert (await agent.commit(later)).status == 201


async def test_refusals_and_bytes_are_counted(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        changeset = make_changeset(machine, Stamp(1, 1))
        before = await server.metrics()
        await agent.send(changeset)
        await agent.put(changeset, 0, body=changeset.segments[1])
        after = await server.metrics()

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("understudy_segments_received_total") == 2
    assert grown("understudy_bytes_received_total") == sum(map(len, changeset.segments))
    assert grown('understudy_refusals_total{code="conflict"}') == 1
    assert after["understudy_spool_bytes_max"] == 1 << 30


@pytest.mark.parametrize(
    ("path", "status"),
    [
        (f"/v1/machines/../machines/{MACHINE}/generations/1/changesets/1/segments/0", 404),
        (f"{ROOT}/generations/1/changesets/1/segments/../../0", 404),
        (f"{ROOT}/generations/1/changesets/%2e%2e/segments/0", 404),
        (f"/v1/machines/%2e%2e/{MACHINE}/generations/1/changesets/1/segments/0", 404),
        (f"{ROOT}/generations/1/changesets/1/segments/0%2f..", 404),
        (f"/v1/machines/{str(MACHINE).upper()}/generations/1/changesets/1/segments/0", 404),
        (f"/v1/machines/{MACHINE.hex}/generations/1/changesets/1/segments/0", 404),
        (f"/{ROOT}/generations/1/changesets/1/segments/0", 404),
        (f"{ROOT}/generations/1//changesets/1/segments/0", 404),
        (f"{ROOT}/generations/1/changesets/1/segments/0/", 404),
        (f"{ROOT}/generations/1/changesets/1/segments/0?x=1", 404),
        (f"{ROOT}/generations/01/changesets/1/segments/0", 404),
        (f"{ROOT}/generations/1/changesets/1/segments/00", 404),
        (f"{ROOT}/generations/+1/changesets/1/segments/0", 404),
        (f"{ROOT}/generations/%D9%A1/changesets/1/segments/0", 404),
        (f"{ROOT}/generations/1/changesets/{'9' * 400}/segments/0", 404),
        (f"{ROOT}/generations/1/changesets/{1 << 63}/segments/0", 400),
        (f"{ROOT}/generations/{1 << 32}/changesets/1/segments/0", 400),
        (f"{ROOT}/generations/0/changesets/1/segments/0", 400),
        (f"{ROOT}/generations/1/changesets/0/segments/0", 400),
        (f"{ROOT}/generations/1/changesets/1/segments/8192", 400),
        ("/", 404),
        ("/healthz", 404),
    ],
)
async def test_path_has_one_spelling(server: ProcessServer, path: str, status: int) -> None:
    async with Agent(server, MACHINE) as agent:
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        answer = await agent.exchange(head.encode())
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    assert server.spooled(MACHINE) == []
    assert not [path for path in server.spool.rglob("*") if path.name.startswith((".", "%"))]


def put_head(machine: uuid.UUID, length: str) -> bytes:
    return (
        f"PUT {segment_path(machine, Stamp(1, 1), 0)} HTTP/1.1\r\nHost: x\r\n"
        f"Understudy-Attempt: {'0' * 32}\r\nUnderstudy-Digest: {'0' * 32}\r\n{length}\r\n\r\n"
    ).encode()


async def test_body_without_length_is_refused(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        answer = await agent.exchange(put_head(machine, "Transfer-Encoding: chunked"))
        assert answer.startswith(b"HTTP/1.1 411 ")
        assert b"length_required" in answer


async def test_body_that_is_too_long_is_refused_before_it_is_read(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        head = f"POST {commit_path(machine, Stamp(1, 1))} HTTP/1.1\r\nHost: x\r\n"
        answers = await asyncio.gather(
            agent.exchange(put_head(machine, f"Content-Length: {(32 << 20) + 1}")),
            agent.exchange(put_head(machine, f"Content-Length: {1 << 62}")),
            agent.exchange(f"{head}Content-Length: {6 << 20}\r\n\r\n".encode()),
        )
        assert all(answer.startswith(b"HTTP/1.1 413 ") for answer in answers), answers


async def test_slow_body_is_refused_and_its_connection_closed(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        answer = await agent.exchange(put_head(machine, "Content-Length: 1000000") + b"USF1")
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"too_slow" in answer
        assert (await agent.state()).status == 200
    assert list((server.spool / "incoming").iterdir()) == []


async def test_endless_body_ends_at_its_first_wrong_frame(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        head = put_head(machine, f"Content-Length: {32 << 20}")
        answer = await agent.exchange(head + bytes(4 << 20))
        assert answer.startswith(b"HTTP/1.1 400 ")


async def test_silent_connection_is_closed(server: ProcessServer) -> None:
    async with Agent(server, uuid.uuid4()) as agent:
        begun = (b"", b"GET /v1/machines/", b"GET / HTTP/1.1\r\nHost: x\r\n")
        answers = await asyncio.gather(*(agent.exchange(one) for one in begun))
        assert answers == [b"", b"", b""]


async def test_lost_connection_leaves_nothing(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    changeset = make_changeset(machine, Stamp(1, 1))
    async with Agent(server, machine) as agent:
        head = put_head(machine, "Content-Length: 30000000")
        with pytest.raises(TimeoutError):
            await agent.exchange(head + changeset.segments[0][:500], wait_seconds=0.5)
        await become(lambda: not list((server.spool / "incoming").iterdir()))
        assert (await agent.send(changeset)).status == 201


async def test_body_waits_until_it_is_invited(server: ProcessServer) -> None:
    machine = uuid.uuid4()
    async with Agent(server, machine) as agent:
        length = "Content-Length: 1000\r\nExpect: 100-continue\r\nConnection: close"
        welcome = put_head(machine, length)
        unwelcome = welcome.replace(b"Understudy-Digest", b"Understudy-Other")
        answers = await asyncio.gather(agent.exchange(welcome), agent.exchange(unwelcome))
        assert answers[0].startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 408 ")
        assert answers[1].startswith(b"HTTP/1.1 400 ")

"""The stream's HTTP side: parse, call, render.

Source: FORMAT.md §9.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Collection
from typing import Any

import structlog
import xxhash
from aiohttp import web

from appliance.process_server.address import (
    CommitAddress,
    SegmentAddress,
    StateAddress,
    read_address,
)
from appliance.process_server.body import declared_length, read_body
from appliance.process_server.config import LimitConfig
from appliance.process_server.disk_threads import settle
from appliance.process_server.measures import Measures
from appliance.process_server.order import Verdict
from appliance.process_server.refusal import CLOSING, WAITING, Kind, RefusedError, kind_of
from appliance.process_server.segment_file import AttemptId, Segment, SegmentFile
from appliance.process_server.stream import Stream, refuse_other_bytes
from appliance.process_server.streams import Streams
from replication.errors import IntegrityError, PeerError, ReplicationError
from replication.manifest import MANIFEST_BYTES_MAX, SEGMENT_BYTES_MAX, read_public
from replication.stream import ATTEMPT_HEADER, DIGEST_HEADER, Refusal

_log = structlog.get_logger()


class Receiver:
    """Answers agents. ``machines``: who may send; empty: each with a certificate of the CA."""

    def __init__(
        self,
        streams: Streams,
        limits: LimitConfig,
        machines: Collection[uuid.UUID],
        measures: Measures,
    ) -> None:
        self._streams = streams
        self._limits = limits
        self._machines = frozenset(machines)
        self._measures = measures
        self._turns = asyncio.Semaphore(limits.segments_in_flight_max)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; what is refused is told in the body."""
        try:
            return await self._answer(request)
        except ReplicationError as error:
            kind = kind_of(error)
            if kind is None:
                raise
            return self._refuse(request, kind, error)

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        address = read_address(request.method, request.raw_path)
        self._admit(request, address.machine)
        stream = await self._streams.find(address.machine)
        if isinstance(address, SegmentAddress):
            created = await self._receive(request, stream, address)
            return web.Response(status=201 if created else 200)
        if isinstance(address, CommitAddress):
            created = await self._commit(request, stream, address)
            return _render_state(stream, 201 if created else 200)
        assert isinstance(address, StateAddress)
        return _render_state(stream, 200)

    def _admit(self, request: web.BaseRequest, machine: uuid.UUID) -> None:
        name = _common_name(request)
        if name != str(machine):
            raise RefusedError(
                Kind.FORBIDDEN,
                f"the certificate is of {name!r:.80}: it may not touch the stream of {machine}",
                hint="issue one with `understudy pki issue --machine UUID`",
            )
        if self._machines and machine not in self._machines:
            raise RefusedError(
                Kind.FORBIDDEN,
                f"machine {machine} is not among those that this server is configured for",
                hint="add it to `machines` in the process server's configuration",
            )

    async def _receive(
        self, request: web.BaseRequest, stream: Stream, address: SegmentAddress
    ) -> bool:
        length = declared_length(request, SEGMENT_BYTES_MAX)
        attempt = AttemptId(
            address.machine, address.stamp, _hex_header(request, ATTEMPT_HEADER, 16)
        )
        digest = _hex_header(request, DIGEST_HEADER, 16)
        there = stream.find_segment(attempt, address.segment)
        if there is not None:
            refuse_other_bytes(there, digest)
            await self._streams.disk.run(self._streams.spool.sync, attempt)
            return False
        async with self._turn():
            reserved = await self._streams.reserve(stream, attempt, length)
            try:
                await _invite_body(request)
                file = await self._streams.disk.run(self._streams.spool.receive, attempt)
                try:
                    segment = await self._store(request, length, file, address.segment)
                    if segment.digest != digest:
                        raise IntegrityError(
                            f"segment {address.segment} of {attempt} has the digest "
                            f"{segment.digest.hex()}; its header says {digest.hex()}",
                            hint="it was altered on its way: send it again",
                        )
                    created = await stream.place(attempt, file, segment, reserved)
                finally:
                    await self._streams.disk.run(file.discard)
            finally:
                reserved.release()
        if created:
            self._measures.segments_received.inc()
            self._measures.bytes_received.inc(length)
        return created

    async def _store(
        self, request: web.BaseRequest, length: int, file: SegmentFile, index: int
    ) -> Segment:
        """Write the body while more of it comes in: one list of pieces ahead at most."""
        disk = self._streams.disk
        writing: asyncio.Future[None] | None = None
        try:
            async for pieces in read_body(request, length, self._limits):
                if writing is not None:
                    await settle(writing)
                writing = disk.start(file.write, pieces)
        finally:
            if writing is not None:
                await settle(writing)
        return await disk.run(file.finish, index)

    async def _commit(
        self, request: web.BaseRequest, stream: Stream, address: CommitAddress
    ) -> bool:
        length = declared_length(request, MANIFEST_BYTES_MAX)
        async with self._turn():
            await _invite_body(request)
            pieces: list[bytes] = []
            async for more in read_body(request, length, self._limits):
                pieces += more
            return await self._commit_content(stream, address, b"".join(pieces))

    async def _commit_content(self, stream: Stream, address: CommitAddress, content: bytes) -> bool:
        manifest = await self._streams.disk.run(read_public, content)
        if (manifest.machine, manifest.stamp) != (address.machine, address.stamp):
            raise PeerError(
                f"the manifest is of changeset {manifest.stamp} of {manifest.machine}, where "
                f"{address.stamp} of {address.machine} was expected"
            )
        verdict = await stream.commit(manifest, content, xxhash.xxh3_128_digest(content))
        if verdict is Verdict.FOLLOWS:
            self._measures.changesets_committed.inc()
        return verdict is Verdict.FOLLOWS

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        async with self._turns:
            self._measures.bodies_in_flight.inc()
            try:
                yield
            finally:
                self._measures.bodies_in_flight.dec()

    def _refuse(
        self, request: web.BaseRequest, kind: Kind, error: ReplicationError
    ) -> web.Response:
        self._measures.refusals.labels(code=kind.code).inc()
        if kind is not Kind.SPOOL_FULL:  # the everyday one is in the metrics and the health
            _log.info("refused", code=kind.code, reason=str(error), path=request.raw_path[:200])
        refusal = Refusal(kind.code, str(error.args[0]), error.hint or "")
        response = web.Response(
            status=kind.status, body=refusal.to_bytes(), content_type="application/json"
        )
        if kind in WAITING:
            response.headers["Retry-After"] = str(self._limits.retry_after_seconds)
        if kind in CLOSING:
            response.force_close()
        return response


def _render_state(stream: Stream, status: int) -> web.Response:
    body = stream.state().to_bytes()
    return web.Response(status=status, body=body, content_type="application/json")


def _common_name(request: web.BaseRequest) -> str:
    """The one common name of the client's certificate; empty when it has none or several."""
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    subject: Any = (certificate or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return str(names[0]) if len(names) == 1 else ""


def _hex_header(request: web.BaseRequest, name: str, size_bytes: int) -> bytes:
    text = request.headers.get(name, "")
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != size_bytes or value.hex() != text:
        raise PeerError(
            f"header {name}: {2 * size_bytes} hexadecimal digits were expected, not {text!r:.80}"
        )
    return value


async def _invite_body(request: web.BaseRequest) -> None:
    """Answer ``Expect: 100-continue``: the client waits with the body until it is welcome."""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0

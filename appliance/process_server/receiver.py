"""The stream's HTTP side: parse, call, render.

Source: FORMAT.md §9.
"""

import contextlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import structlog
import xxhash
from aiohttp import web

from appliance.process_server.address import (
    CommitAddress,
    SegmentAddress,
    StateAddress,
    SumsAddress,
    read_address,
)
from appliance.process_server.admission import Admission, Shown
from appliance.process_server.body import declared_length, read_body
from appliance.process_server.config import LimitConfig
from appliance.process_server.disk_threads import settle
from appliance.process_server.measures import Measures
from appliance.process_server.order import Verdict
from appliance.process_server.refusal import CLOSING, WAITING, Kind, kind_of
from appliance.process_server.segment_file import AttemptId, Segment, SegmentFile
from appliance.process_server.stream import Stream, refuse_other_bytes
from appliance.process_server.streams import Streams
from appliance.process_server.turns import Turns
from replication.bookmark import MachineId
from replication.errors import IntegrityError, PeerError, ReplicationError
from replication.manifest import MANIFEST_BYTES_MAX, SEGMENT_BYTES_MAX, read_public
from replication.stream import ATTEMPT_HEADER, DIGEST_HEADER, Refusal

if TYPE_CHECKING:
    import asyncio

_EVERYDAY = frozenset({Kind.SPOOL_FULL, Kind.QUOTA})
_log = structlog.get_logger()


class Receiver:
    """Answers agents."""

    def __init__(
        self, streams: Streams, limits: LimitConfig, admission: Admission, measures: Measures
    ) -> None:
        self._streams = streams
        self._limits = limits
        self._admission = admission
        self._measures = measures
        self._turns = Turns(limits)

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
        self._admission.check(_shown(request), address.machine)
        if isinstance(address, SumsAddress):
            async with self._turn(address.machine):
                sums = await self._streams.sums(address)
            return web.Response(body=sums, content_type="application/octet-stream")
        stream = await self._streams.find(address.machine)
        if isinstance(address, SegmentAddress):
            created = await self._receive(request, stream, address)
            return web.Response(status=201 if created else 200)
        if isinstance(address, CommitAddress):
            created = await self._commit(request, stream, address)
            return _render_state(stream, 201 if created else 200)
        assert isinstance(address, StateAddress)
        return _render_state(stream, 200)

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
        async with self._turn(address.machine):
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
        async with self._turn(address.machine):
            stream.room.check_commit(length, self._streams.part_of(stream))
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
    async def _turn(self, machine: MachineId) -> AsyncIterator[None]:
        async with self._turns.take(machine):
            self._measures.bodies_in_flight.inc()
            try:
                yield
            finally:
                self._measures.bodies_in_flight.dec()

    def _refuse(
        self, request: web.BaseRequest, kind: Kind, error: ReplicationError
    ) -> web.Response:
        self._measures.refusals.labels(code=kind.code).inc()
        if kind not in _EVERYDAY:  # those are in the metrics and the health
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


def _shown(request: web.BaseRequest) -> Shown:
    return Shown.of(request.transport.get_extra_info("peercert") if request.transport else None)


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

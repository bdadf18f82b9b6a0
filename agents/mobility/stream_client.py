"""The agent's end of the stream: HTTPS requests, retried while that can help.

Retries never give up by themselves while the process server is away or full: the changeset waits,
with constant memory, and tracking goes on. They end when ``stopping`` is set.
"""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Self

import aiohttp
import structlog

from agents.mobility.config import SendConfig
from agents.mobility.frame_builder import Segment
from daemon.tls import TlsFiles, client_context, demand_unit
from replication.bookmark import Stamp
from replication.errors import (
    CaptureError,
    OutOfOrderError,
    PeerError,
    ReplicationError,
    UnavailableError,
)
from replication.stream import (
    ATTEMPT_HEADER,
    DIGEST_HEADER,
    STATE_BYTES_MAX,
    Refusal,
    StreamState,
    commit_path,
    segment_path,
    state_path,
    sums_path,
)

BACKOFF_SECONDS_MIN = 0.2
CONNECT_SECONDS_MAX = 10.0
PIECE_BYTES = 256 << 10
LOOK_SECONDS = 1.0
STOPPING = "the agent is stopping; the changeset is taken anew later"
CORRUPTED_TRIES_MAX = 5
"""How often a body may arrive damaged before something must be wrong with this machine."""


class Pace:
    """A bandwidth limit: sleeps so that no more than so many bytes a second go out."""

    def __init__(self, bytes_per_second_max: int) -> None:
        self._rate = bytes_per_second_max
        self._free_at = 0.0

    async def spend(self, size_bytes: int) -> None:
        if not self._rate:
            return
        now = time.monotonic()
        self._free_at = max(self._free_at, now - 0.1) + size_bytes / self._rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class StreamClient:
    """Requests to one process server for one machine; an async context manager.

    server_unit: organizational unit that the server's certificate must have; empty: any.
    """

    def __init__(
        self,
        origin: str,
        machine: uuid.UUID,
        tls: TlsFiles,
        config: SendConfig,
        *,
        stopping: asyncio.Event,
        on_trouble: Callable[[str], None],
        server_unit: str = "",
    ) -> None:
        self._origin = origin
        self._machine = machine
        self._context = client_context(tls)
        if server_unit:
            demand_unit(self._context, server_unit)
        self._config = config
        self._stopping = stopping
        self._on_trouble = on_trouble
        self._pace = Pace(config.bandwidth_bytes_per_second_max)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=self._context, limit=self._config.segments_in_flight_max + 2
            ),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=CONNECT_SECONDS_MAX,
                sock_read=self._config.request_seconds_max,
            ),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    def renew(self, tls: TlsFiles) -> None:
        """Show another certificate from the next connection on."""
        self._context.load_cert_chain(tls.certificate, tls.key)

    async def state(self) -> StreamState:
        """What the process server holds of this machine's stream."""
        body = await self._persist("GET", state_path(self._machine), b"", {})
        return StreamState.from_bytes(body)

    async def put_segment(self, stamp: Stamp, attempt: bytes, segment: Segment) -> None:
        """Store a segment; on return it is on the process server's stable storage."""
        headers = {
            ATTEMPT_HEADER: attempt.hex(),
            DIGEST_HEADER: segment.entry.digest.hex(),
            "Content-Length": str(len(segment.data)),
        }
        path = segment_path(self._machine, stamp, segment.index)
        await self._persist("PUT", path, segment.data, headers)

    async def commit(self, stamp: Stamp, manifest: bytes) -> StreamState:
        """End a changeset; on return it is acknowledged."""
        headers = {"Content-Length": str(len(manifest))}
        body = await self._persist("POST", commit_path(self._machine, stamp), manifest, headers)
        return StreamState.from_bytes(body)

    async def sums(self, generation: int, disk: int, level: int, part: int) -> bytes | None:
        """A part of the sums of the second site's state (``sums.py``); None while there is none."""
        path = sums_path(self._machine, generation, disk, level, part)
        try:
            data = await self._persist("GET", path, b"", {})
        except _AbsentError:
            return None
        await self._pace.spend(len(data))
        return data

    async def _persist(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        """Try until it succeeds, is refused for good, or the agent stops."""
        backoff_seconds = BACKOFF_SECONDS_MIN
        corrupted = 0
        while True:
            try:
                answer = await self._try(method, path, body, headers)
            except _CorruptedError as error:
                corrupted += 1
                if corrupted >= CORRUPTED_TRIES_MAX:
                    raise PeerError(f"{error}", hint="test this machine's memory") from error
                trouble, wait_seconds = str(error), 0.0
            except UnavailableError as error:
                trouble, wait_seconds = str(error), getattr(error, "retry_after_seconds", 0.0)
            else:
                self._on_trouble("")
                return answer
            self._on_trouble(trouble)
            structlog.get_logger().debug("request waits", trouble=trouble, path=path)
            jittered = backoff_seconds * random.uniform(0.5, 1.0)  # noqa: S311 - spread, not secret
            await self._sleep(max(wait_seconds, jittered))
            backoff_seconds = min(2 * backoff_seconds, self._config.backoff_seconds_max)

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stopping.wait(), seconds)
        except TimeoutError:
            return
        raise CaptureError(STOPPING)

    async def _try(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        """One exchange, given up at once when the agent stops or nothing moves any more."""
        if self._stopping.is_set():
            raise CaptureError(STOPPING)
        sending = _Sending(body, self._pace)
        exchange = asyncio.create_task(self._exchange(method, path, sending, headers))
        stopped = asyncio.create_task(self._stopping.wait())
        try:
            while not exchange.done():
                await asyncio.wait(
                    {exchange, stopped}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if exchange.done():
                    break
                if stopped.done():
                    raise CaptureError(STOPPING)
                if sending.stalled_seconds() > self._config.request_seconds_max:
                    raise UnavailableError(f"process server {self._origin} takes no more data")
            return exchange.result()
        finally:
            exchange.cancel()
            stopped.cancel()
            await asyncio.gather(exchange, stopped, return_exceptions=True)

    async def _exchange(
        self, method: str, path: str, sending: "_Sending", headers: dict[str, str]
    ) -> bytes:
        assert self._session is not None
        try:
            async with self._session.request(
                method,
                self._origin + path,
                data=sending.pieces() if sending.body else None,
                headers=headers,
                allow_redirects=False,
            ) as response:
                sending.end()
                answer = bytearray()
                while len(answer) <= STATE_BYTES_MAX:
                    piece = await response.content.read(STATE_BYTES_MAX)
                    if not piece:
                        break
                    answer += piece
                if response.status in (200, 201):
                    return bytes(answer)
                raise _refused(
                    response.status, response.headers.get("Retry-After", ""), bytes(answer)
                )
        except aiohttp.ClientConnectorCertificateError as error:
            raise UnavailableError(
                f"{self._origin} shows a certificate that does not fit: {error}",
                hint="its name must be in the certificate, and its CA the one in tls.ca",
            ) from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            raise UnavailableError(f"process server {self._origin}: {what}") from error


class _Sending:
    """A body on its way, and since when nothing of it has moved."""

    def __init__(self, body: bytes, pace: Pace) -> None:
        self.body = body
        self._pace = pace
        self._waits_since: float | None = None

    async def pieces(self) -> AsyncIterator[memoryview]:
        view = memoryview(self.body)
        for offset in range(0, len(view), PIECE_BYTES):
            piece = view[offset : offset + PIECE_BYTES]
            self._waits_since = None
            await self._pace.spend(len(piece))
            self._waits_since = time.monotonic()
            yield piece
        self._waits_since = None  # from here on the session's own limits count

    def end(self) -> None:
        """An answer has begun, whether the whole body was taken or not."""
        self._waits_since = None

    def stalled_seconds(self) -> float:
        return 0.0 if self._waits_since is None else time.monotonic() - self._waits_since


class _CorruptedError(ReplicationError):
    """A body did not arrive as it was sent."""


class _AbsentError(PeerError):
    """What was asked for is not there (yet)."""


class _RetryLaterError(UnavailableError):
    """The process server asks to be left alone for a while."""

    def __init__(self, message: str, retry_after_seconds: float) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


def _refused(status: int, retry_after: str, body: bytes) -> ReplicationError:
    try:
        refusal = Refusal.from_bytes(body)
    except PeerError:
        refusal = Refusal("", f"HTTP status {status}")
    message = f"process server: {refusal.message}"
    if status == 404:
        return _AbsentError(message, hint=refusal.hint or None)
    if status == 409:
        return OutOfOrderError(message, hint=refusal.hint or None)
    if status == 422:
        return _CorruptedError(message)
    if status in (408, 429) or status >= 500:
        seconds = float(retry_after) if retry_after.isdecimal() else 0.0
        return _RetryLaterError(message, min(seconds, 60.0))
    return PeerError(message, hint=refusal.hint or None)

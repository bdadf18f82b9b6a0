"""The HTTPS listener: TLS 1.3 with client certificates, and patience with an end."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from appliance.process_server.config import LimitConfig, ListenConfig
from appliance.process_server.refusal import Kind
from replication.errors import ConfigError
from replication.stream import Refusal

READ_BUFFER_BYTES = 256 << 10
LINGER_SECONDS_MAX = 1.0
DRAIN_SECONDS_MAX = 6.0
CLOSE_SECONDS_MAX = 1.0
ACCEPT_BACKLOG = 128

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def listen(
    config: ListenConfig, tls: ssl.SSLContext, limits: LimitConfig, handler: Handler
) -> AsyncIterator[int]:
    """Serve ``handler`` while the context is open; yields the port.

    tls: certificates that are loaded into it meanwhile are shown to who connects from then on.

    On leaving, requests that have begun are given DRAIN_SECONDS_MAX. Raises ConfigError when the
    address cannot be used.
    """
    loop = asyncio.get_running_loop()
    silent: set[RequestHandler] = set()  # connected, and no whole request yet
    under_way = _UnderWay()

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        silent.discard(request.protocol)
        if under_way.is_draining():
            return _say_goodbye()
        with under_way:
            response = await handler(request)
        if under_way.is_draining():
            response.force_close()
        return response

    server = web.Server(
        answer,
        access_log=None,
        keepalive_timeout=limits.idle_seconds_max,
        lingering_time=LINGER_SECONDS_MAX,
        read_bufsize=READ_BUFFER_BYTES,
        auto_decompress=False,  # else a body could be larger than what was reserved for it
    )

    def connect() -> RequestHandler:
        protocol = server()
        silent.add(protocol)
        loop.call_later(limits.header_seconds_max, drop_silent, protocol)
        return protocol

    def drop_silent(protocol: RequestHandler) -> None:
        if protocol in silent:
            silent.discard(protocol)
            if protocol.transport is not None:
                protocol.transport.close()

    try:
        listener = await loop.create_server(
            connect,
            config.host,
            config.port,
            ssl=tls,
            backlog=ACCEPT_BACKLOG,
            ssl_handshake_timeout=limits.header_seconds_max,
        )
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}",
            hint="see who holds the port with `ss -ltnp`, or configure another one",
        ) from error
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        await under_way.drain(DRAIN_SECONDS_MAX)
        await server.shutdown(CLOSE_SECONDS_MAX)  # which reads no more of any body
        await listener.wait_closed()


class _UnderWay:
    """Counts the requests that are being answered."""

    def __init__(self) -> None:
        self._draining = False
        self._count = 0
        self._changed = asyncio.Event()

    def __enter__(self) -> None:
        self._count += 1

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        self._changed.set()

    def is_draining(self) -> bool:
        return self._draining

    async def drain(self, seconds_max: float) -> None:
        """Wait until none is left, for ``seconds_max`` at most; no new ones are taken."""
        self._draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds_max):
                while self._count:
                    self._changed.clear()
                    await self._changed.wait()


def _say_goodbye() -> web.Response:
    refusal = Refusal(Kind.UNAVAILABLE.code, "the process server is stopping", "try again soon")
    response = web.Response(
        status=Kind.UNAVAILABLE.status,
        body=refusal.to_bytes(),
        content_type="application/json",
        headers={"Retry-After": "1"},
    )
    response.force_close()
    return response

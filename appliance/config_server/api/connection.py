"""One connection: uvicorn's HTTP/1.1, and what it leaves open: who is at the other end, and limits
of time and size before anything reaches the application.

Source: RFC 9112 (HTTP/1.1), RFC 6585 §5 (431), RFC 9110 §15.5.9 (408).
"""

import asyncio
import json
import time
from collections import Counter
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from uvicorn import Config as UvicornConfig
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from appliance.config_server.api.errors import code_of
from appliance.config_server.api.limits import source_of
from appliance.config_server.api.peer import Peer, state_with
from appliance.config_server.config import LimitConfig

HEADER_BYTES_MAX = 32 << 10
"""Of a request line and its header fields."""

LINGER_SECONDS = 1.0
"""How long what still comes is thrown away after a refusal: closed at once, the kernel would
answer it with a reset, and the peer would never read why.
"""

DISCARDED_BYTES_MAX = 8 << 20
"""Of a body that goes on coming after its response; then the connection ends."""

_EVERY_RESPONSE = [(b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]


class Connections(ServerState):
    """All open connections; how many each node has, and each source that shows no certificate.

    A certificate that was revoked still makes a connection: access is refused on each request.
    """

    def __init__(self, limits: LimitConfig) -> None:
        self._headers: list[tuple[bytes, bytes]] = []
        self._headers_second = 0
        super().__init__()
        self.limits = limits
        self.by_holder: Counter[str] = Counter()

    @property
    def default_headers(self) -> list[tuple[bytes, bytes]]:
        """What each response carries, its date among it; of this very second."""
        second = int(time.time())
        if second != self._headers_second:
            date = formatdate(second, usegmt=True).encode()
            self._headers = [(b"date", date), *_EVERY_RESPONSE]
            self._headers_second = second
        return self._headers

    @default_headers.setter
    def default_headers(self, _: list[tuple[bytes, bytes]]) -> None:
        """Uvicorn's own server would set them; there is none here."""


class Connection(HttpToolsProtocol):
    """A connection that knows its peer and keeps to the limits."""

    def __init__(self, config: UvicornConfig, connections: Connections) -> None:
        super().__init__(config, connections, {})
        self.access_log = False
        self._all = connections
        self._limits = connections.limits
        self._holder: str | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._in_header = False
        self._begun = False
        self._header_bytes = 0
        self._discarded_bytes = 0
        self._refused = False
        self._refusal = HTTPStatus.BAD_REQUEST

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        peer = _peer_of(transport)
        self.app_state = state_with(peer)
        limits, held = self._limits, self._all.by_holder
        if peer is None:
            self._holder = source_of(self.client[0] if self.client else "")
            most = limits.connections_per_source_max
        else:
            self._holder, most = f"node {peer.node}", limits.connections_per_node_max
        held[self._holder] += 1
        if len(self.connections) > limits.connections_max or held[self._holder] > most:
            transport.abort()
            return
        self._expect_within(self._limits.header_seconds_max)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        if self._holder is not None:
            held = self._all.by_holder
            held[self._holder] -= 1
            if not held[self._holder]:
                del held[self._holder]
            self._holder = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        super().data_received(data)
        if not self._in_header:
            return
        self._header_bytes += len(data)
        if self._header_bytes > HEADER_BYTES_MAX:
            # The parser collects a field for itself until it is whole.
            self.refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the header is too large")

    def on_message_begin(self) -> None:
        self._in_header, self._begun, self._header_bytes = True, True, 0
        self._expect_within(self._limits.header_seconds_max)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_header = False
        self._expect_within(self._limits.body_seconds_max)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle.response_complete:
            self._discarded_bytes += len(body)
            if self._discarded_bytes > DISCARDED_BYTES_MAX:
                self.transport.close()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._expect_nothing()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self.refuse(self._refusal, msg)

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer in the API's shape from here, where no application is reached, and close."""
        if self._refused or self.transport.is_closing():
            return
        self._expect_nothing()
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            document: dict[str, Any] = {
                "code": code_of(status),
                "message": message,
                "hint": None,
                "details": {},
            }
            body = json.dumps(document).encode()
            fields = [
                *self._all.default_headers,
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            lines = [f"HTTP/1.1 {status.value} {status.phrase}".encode()]
            lines += [name + b": " + value for name, value in fields]
            self.transport.write(b"\r\n".join([*lines, b"", body]))
        self._refused = True
        self._deadline = self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > 2 * HEADER_BYTES_MAX:  # counted here and as they came in
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise ValueError(self._header_bytes)

    def _expect_within(self, seconds: float) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(seconds, self._too_slow)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        if self._begun:
            self.refuse(HTTPStatus.REQUEST_TIMEOUT, "the request did not come in time")
        else:
            self.transport.close()


def _peer_of(transport: asyncio.Transport) -> Peer | None:
    tls: Any = transport.get_extra_info("ssl_object")
    der = tls.getpeercert(binary_form=True) if tls else None
    return Peer.of_certificate(der) if der else None

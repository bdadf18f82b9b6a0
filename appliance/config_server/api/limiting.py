"""What stands before all routes: how often a caller may ask, and how much it may send.

Source: docs/CONTROL.md §6.
"""

from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from appliance.config_server.api.errors import respond, respond_to
from appliance.config_server.api.limits import Rates, source_of
from appliance.config_server.api.peer import peer_of
from appliance.config_server.config import LimitConfig
from replication.control.report import REPORT_BYTES_MAX
from replication.errors import LimitError

BODY_BYTES_MAX = REPORT_BYTES_MAX
_REFUSALS = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


class Limiting:
    """Nodes are counted by their certificate: a thousand of them may share one address."""

    def __init__(self, app: ASGIApp, limits: LimitConfig) -> None:
        self._app = app
        self._sources = Rates(limits.requests_per_second, limits.requests_burst)
        self._nodes = Rates(limits.node_requests_per_second, limits.node_requests_burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        wait = self._take(connection)
        if wait > 0:
            error = LimitError("too many requests", hint="wait", retry_after_seconds=wait)
            await respond_to(error)(scope, receive, send)
            return
        length = connection.headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > BODY_BYTES_MAX:
            await _too_large()(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > BODY_BYTES_MAX:
                raise HTTPException(413, _too_large_text())
            return message

        if peer_of(connection) is not None:
            send = _closing(send)
        await self._app(scope, counted, send)

    def _take(self, connection: HTTPConnection) -> float:
        peer = peer_of(connection)
        if peer is not None:
            return self._nodes.take(str(peer.node))
        return self._sources.take(source_of(connection.client.host if connection.client else ""))


def _closing(send: Send) -> Send:
    """End the connection of a node that was refused: revoked, it would keep it for ever."""

    async def closing(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] in _REFUSALS:
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return closing


def _too_large_text() -> str:
    return f"the body is larger than {BODY_BYTES_MAX} bytes"


def _too_large() -> ASGIApp:
    return respond(413, "too_large", _too_large_text())

"""One request to the config server and what its answer means, for enrolment and for the client.

Only a server whose certificate says ``config-server`` is talked to: every process server holds a
server's certificate of the same CA, and must not be able to pass for the config server.

Source: docs/CONTROL.md §6 (the shape of errors).
"""

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp
from pydantic import ValidationError

from daemon.tls import CONFIG_SERVER_UNIT, TlsFiles, client_context, demand_unit
from replication.control.message import Message
from replication.errors import PeerError, UnavailableError

API_PREFIX = "/api/v1/"
ANSWER_BYTES_MAX = 8 << 20
CONNECT_SECONDS_MAX = 10.0
CALL_SECONDS_MAX = 30.0
CONNECTIONS_MAX = 4

M = TypeVar("M", bound=Message)


class RefusedError(PeerError):
    """The config server understood the request and refused it.

    status: of HTTP.
    reason: the config server's own code for it.
    """

    def __init__(self, message: str, *, status: int, reason: str, hint: str | None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.reason = reason


def enrolled_context(files: TlsFiles) -> ssl.SSLContext:
    """For an enrolled node: shows its certificate."""
    context = client_context(files)
    demand_unit(context, CONFIG_SERVER_UNIT)
    return context


def proved_context(ca_pem: str) -> ssl.SSLContext:
    """For a node that knows the CA and has no certificate yet; PeerError when it is no CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=ca_pem)
    except ssl.SSLError as error:
        raise PeerError(f"the config server sent a CA that is none: {error}") from error
    demand_unit(context, CONFIG_SERVER_UNIT)
    return context


def unproved_context() -> ssl.SSLContext:
    """For the first message of an enrolment alone: nothing is trusted that comes this way."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class ControlCalls:
    """Requests to one config server over connections of one TLS context."""

    def __init__(self, config_server: str, context: ssl.SSLContext) -> None:
        self._base = config_server + API_PREFIX
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS_MAX),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    async def ask(
        self,
        method: str,
        path: str,
        *,
        body: Message | None = None,
        query: dict[str, str] | None = None,
        seconds_max: float = CALL_SECONDS_MAX,
    ) -> bytes | None:
        """The answer's body, None for 204.

        Raises UnavailableError when there is no answer or one that says "later", RefusedError.
        """
        timeout = aiohttp.ClientTimeout(total=seconds_max, sock_connect=CONNECT_SECONDS_MAX)
        content = None if body is None else body.model_dump_json().encode()
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            async with self._session.request(
                method,
                self._base + path,
                params=query,
                data=content,
                headers=headers,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                answer = await _read_bounded(response)
                if response.status == 204:
                    return None
                if 200 <= response.status < 300:
                    return answer
                raise _refusal(path, response.status, answer)
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise UnavailableError(
                f"no TLS with {self._base}: {error}",
                hint="is the URL's name among the config server's names, are both clocks right, "
                "and is it the config server that this node enrolled with?",
            ) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            told = str(error) or type(error).__name__
            raise UnavailableError(
                f"cannot reach {self._base}: {told}", hint="network, firewall, the config server"
            ) from error


@asynccontextmanager
async def calls_to(config_server: str, context: ssl.SSLContext) -> AsyncIterator[ControlCalls]:
    calls = ControlCalls(config_server, context)
    try:
        yield calls
    finally:
        await calls.close()


def parse(kind: type[M], answer: bytes | None, what: str) -> M:
    """Raise PeerError when the answer is no such document."""
    try:
        return kind.model_validate_json(answer or b"")
    except ValidationError as error:
        raise PeerError(
            f"the config server's answer is no {what}: {error.errors()[0]['msg']}",
            hint="are both of the same version?",
        ) from error


async def _read_bounded(response: aiohttp.ClientResponse) -> bytes:
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) > ANSWER_BYTES_MAX:
            response.close()
            raise PeerError(f"an answer of more than {ANSWER_BYTES_MAX} bytes is not taken")
    return bytes(content)


def _refusal(path: str, status: int, answer: bytes) -> UnavailableError | RefusedError:
    told: dict[str, Any] = {}
    try:
        parsed = json.loads(answer)
        if isinstance(parsed, dict):
            told = parsed
    except (ValueError, RecursionError):
        pass
    message = f"{path}: {told.get('message') or f'HTTP {status}'}"[:2000]
    hint = str(told["hint"])[:2000] if told.get("hint") else None
    if status == 429 or status >= 500:
        return UnavailableError(message, hint=hint)
    return RefusedError(message, status=status, reason=str(told.get("code", "")), hint=hint)

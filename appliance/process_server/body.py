"""A request's body, read at no less than a minimum rate."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.web_protocol import RequestPayloadError

from appliance.process_server.config import LimitConfig
from appliance.process_server.refusal import Kind, RefusedError
from replication.errors import PeerError

PIECE_BYTES_MIN = 1 << 20
"""What is gathered before it is handed on, so that threads are not woken for crumbs."""


def declared_length(request: web.BaseRequest, bytes_max: int) -> int:
    """A body's Content-Length; RefusedError when there is none or it is over ``bytes_max``."""
    length = request.content_length
    if length is None:
        raise RefusedError(Kind.LENGTH_REQUIRED, "the request has no Content-Length")
    if length > bytes_max:
        raise RefusedError(Kind.TOO_LARGE, f"the body has {length} bytes, more than {bytes_max}")
    return length


async def read_body(
    request: web.BaseRequest, length: int, limits: LimitConfig
) -> AsyncIterator[list[bytes]]:
    """Yield ``length`` bytes in lists of pieces, each list of about PIECE_BYTES_MIN.

    Only the time that the client lets us wait counts against its rate. Raises RefusedError
    (too_slow), PeerError when the body ends early or the connection is lost.
    """
    loop = asyncio.get_running_loop()
    received, waited = 0, 0.0
    gathered: list[bytes] = []
    gathered_bytes = 0
    while received < length:
        allowed = limits.body_grace_seconds + received / limits.body_rate_bytes_per_second_min
        began = loop.time()
        try:
            async with asyncio.timeout(max(allowed - waited, 0.0)):
                piece = await request.content.readany()
        except TimeoutError as error:
            raise RefusedError(
                Kind.TOO_SLOW,
                f"{received} of {length} bytes came in {waited + loop.time() - began:.1f} s: at "
                f"least {limits.body_rate_bytes_per_second_min} bytes a second were expected",
                hint="the network is slower than this server's limits allow for",
            ) from error
        except (ConnectionError, RequestPayloadError) as error:
            raise PeerError(f"the body ends after {received} of {length} bytes") from error
        waited += loop.time() - began
        if not piece:
            raise PeerError(f"the body ends after {received} of {length} bytes")
        received += len(piece)
        gathered.append(piece)
        gathered_bytes += len(piece)
        if gathered_bytes >= PIECE_BYTES_MIN:
            yield gathered
            gathered, gathered_bytes = [], 0
    if gathered:
        yield gathered

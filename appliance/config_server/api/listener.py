"""The HTTPS port: TLS 1.3; nodes show certificates, operators do not.

Uvicorn's protocol without uvicorn's server: signals belong to the daemon, handshakes have a limit,
and an idle server sleeps.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import AsyncIterator

from starlette.types import ASGIApp
from uvicorn import Config as UvicornConfig

from appliance.config_server.api.connection import Connection, Connections
from appliance.config_server.config import LimitConfig, ListenConfig
from replication.errors import ConfigError

BACKLOG = 1024
TLS_BUFFER_BYTES = 32 << 10
"""What asyncio sets aside for each TLS connection; by itself 256 KiB, touched from the beginning:
half a gigabyte for a thousand agents, who say two kilobytes at a time.
"""

DRAIN_SECONDS_MAX = 5.0
"""For requests under way when the daemon ends; less than the daemon's own limit."""

TLS_SHUTDOWN_SECONDS_MAX = 2.0


@contextlib.asynccontextmanager
async def listen(
    app: ASGIApp, context: ssl.SSLContext, where: ListenConfig, limits: LimitConfig
) -> AsyncIterator[int]:
    """Answer on the port that is given; at the end let requests under way finish.

    Raises ConfigError when the port cannot be had.
    """
    assert context.minimum_version == ssl.TLSVersion.TLSv1_3
    assert context.verify_mode == ssl.CERT_OPTIONAL
    SSLProtocol.max_size = TLS_BUFFER_BYTES  # of this process: nobody else in it moves bulk
    context.num_tickets = 0  # a resumed session would not be checked against what is new
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # peers' mistakes are no news
    config = UvicornConfig(
        app,
        log_config=None,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.idle_seconds_max,  # type: ignore[arg-type]  # seconds of a timer
    )
    config.load()
    connections = Connections(limits)
    listening = _bind(where)
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(config, connections),
        sock=listening,
        ssl=context,
        backlog=BACKLOG,
        ssl_handshake_timeout=limits.header_seconds_max,
        ssl_shutdown_timeout=TLS_SHUTDOWN_SECONDS_MAX,
    )
    try:
        yield listening.getsockname()[1]
    finally:
        server.close()
        await _drain(connections)
        await server.wait_closed()


def _bind(where: ListenConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((where.host, where.port))
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {where.host}:{where.port}: {error.strerror or error}",
            hint="choose another listen.host or listen.port, or stop what listens there",
        ) from error
    return listening


async def _drain(connections: Connections) -> None:
    for connection in list(connections.connections):
        connection.shutdown()
    if connections.tasks:
        await asyncio.wait(connections.tasks, timeout=DRAIN_SECONDS_MAX)
    for connection in list(connections.connections):
        assert isinstance(connection, Connection)
        connection.transport.abort()
    late = list(connections.tasks)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)

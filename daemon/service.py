"""The life of a daemon: start, be ready, be watched, drain, stop.

A daemon's ``serve`` coroutine runs until ``stop`` is set, then drains and returns. A first SIGTERM
or SIGINT asks for that; a second one, or DRAIN_SECONDS_MAX passing, cancels it. Health and metrics
are answered on a private port; systemd is told of readiness and, where it asks, kept fed.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

import structlog
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from pydantic import Field

from daemon.config import Section
from daemon.heap import MAPPED_BYTES_MIN, bound_heap
from daemon.log import configure_log
from replication.errors import ConfigError, ReplicationError

DRAIN_SECONDS_MAX = 10.0
UNEXPECTED_EXIT_CODE = 70


class ServiceConfig(Section):
    """What every daemon's configuration may say about its own life.

    health_host, health_port: where ``/healthz`` and ``/metrics`` answer; no port: nowhere.
    """

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_json: bool = False
    health_host: str = "127.0.0.1"
    health_port: int | None = Field(default=None, ge=0, le=65535)


@dataclass(slots=True)
class Health:
    """What the daemon says of itself: reasons for not being well, by the part that has them."""

    warnings: dict[str, str] = field(default_factory=dict)
    criticals: dict[str, str] = field(default_factory=dict)

    def report(self, part: str, *, warning: str = "", critical: str = "") -> None:
        """Replace what ``part`` had to say; nothing means well."""
        for told, reason in ((self.warnings, warning), (self.criticals, critical)):
            if reason:
                told[part] = reason
            else:
                told.pop(part, None)

    @property
    def state(self) -> str:
        if self.criticals:
            return "critical"
        return "warning" if self.warnings else "normal"


@dataclass(frozen=True, slots=True)
class Service:
    """What a running daemon is handed."""

    stop: asyncio.Event
    health: Health
    registry: CollectorRegistry

    def ready(self, what: str) -> None:
        """Tell systemd and the log that requests are answered from now on."""
        notify("READY=1")
        structlog.get_logger().info("ready", what=what)


def notify(message: str) -> None:
    """Send one message to systemd if it listens. Source: sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    with channel, contextlib.suppress(OSError):
        channel.sendto(message.encode(), address)


def run_daemon(
    name: str,
    config: ServiceConfig,
    serve: Callable[[Service], Awaitable[None]],
    *,
    mapped_bytes_min: int = MAPPED_BYTES_MIN,
) -> int:
    """Run ``serve`` to its end and return the process's exit code.

    mapped_bytes_min: see `bound_heap`; its limits hold for every daemon, before it has a thread.
    """
    bound_heap(mapped_bytes_min)
    configure_log(daemon=name, as_json=config.log_json, level=config.log_level)
    exit_code = 0
    try:
        asyncio.run(_live(config, serve))
    except* ReplicationError as failures:
        exit_code = report_failures(failures)
    except* asyncio.CancelledError:
        structlog.get_logger().warning("stopped before it was drained")
    except* Exception as failures:  # noqa: BLE001 - the outermost place: told whole, then we end
        structlog.get_logger().error("a defect stopped the daemon", exc_info=failures)
        exit_code = UNEXPECTED_EXIT_CODE
    return exit_code


def report_failures(failures: BaseExceptionGroup[ReplicationError]) -> int:
    """Log each leaf of the group and its hint; return the exit code of the first."""
    leaves = list(_leaves(failures))
    for leaf in leaves:
        structlog.get_logger().error(str(leaf.args[0]), code=leaf.code, hint=leaf.hint)
    return leaves[0].exit_code


def _leaves(group: BaseExceptionGroup[ReplicationError]) -> list[ReplicationError]:
    found: list[ReplicationError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _live(config: ServiceConfig, serve: Callable[[Service], Awaitable[None]]) -> None:
    service = Service(asyncio.Event(), Health(), CollectorRegistry())
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(serve(service))

    def on_signal() -> None:
        if service.stop.is_set():
            task.cancel()
            return
        service.stop.set()
        notify("STOPPING=1")
        loop.call_later(DRAIN_SECONDS_MAX, task.cancel)

    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, on_signal)
    async with _health_server(config, service), _watchdog():
        await task


@contextlib.asynccontextmanager
async def _health_server(config: ServiceConfig, service: Service) -> AsyncIterator[None]:
    if config.health_port is None:
        yield
        return

    async def healthz(_: web.Request) -> web.Response:
        health = service.health
        body = {"state": health.state, "warnings": health.warnings, "criticals": health.criticals}
        return web.json_response(body, status=503 if health.criticals else 200)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(service.registry), content_type="text/plain")

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, config.health_host, config.health_port).start()
        except OSError as error:
            raise ConfigError(
                f"cannot answer health checks on {config.health_host}:{config.health_port}: "
                f"{error.strerror}",
                hint="choose another service.health_port",
            ) from error
        yield
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _watchdog() -> AsyncIterator[None]:
    """Feed systemd's watchdog twice per its period, from the loop that must stay alive."""
    period_us = int(os.environ.get("WATCHDOG_USEC", "0") or 0)

    async def feed() -> None:
        while True:
            notify("WATCHDOG=1")
            await asyncio.sleep(period_us / 2e6)

    feeder = asyncio.create_task(feed(), name="watchdog") if period_us else None
    try:
        yield
    finally:
        if feeder:
            feeder.cancel()


def fail(error: ReplicationError) -> int:
    """Tell a person on standard error why a command ends, and return its exit code."""
    print(f"error: {error.args[0]}", file=sys.stderr)  # noqa: T201 - this is the user's terminal
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)  # noqa: T201
    return error.exit_code

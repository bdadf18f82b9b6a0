"""Watching as a part of the config server."""

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.store.engine import Database
from appliance.config_server.watching.alerts import AlertMailer
from appliance.config_server.watching.config import SmtpConfig, WatchingConfig
from appliance.config_server.watching.metrics import RequestMeasures, WatchCollector
from appliance.config_server.watching.smtp import check
from appliance.config_server.watching.watcher import Watcher
from daemon.service import Health


@dataclass(frozen=True, slots=True)
class Watching:
    """What routes ask and what runs."""

    watcher: Watcher
    mailer: AlertMailer
    measures: RequestMeasures

    async def run(self) -> None:
        """Look and mail until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.watcher.run(), name="watcher")
            tasks.create_task(self.mailer.run(), name="alert e-mail")


@contextlib.contextmanager
def open_watching(
    config: WatchingConfig,
    smtp: SmtpConfig,
    *,
    database: Database,
    health: Health,
    registry: CollectorRegistry,
    clock: Callable[[], int],
    newest: Callable[[uuid.UUID], Heard | None],
) -> Iterator[Watching]:
    """Raises ConfigError where the SMTP password or CA cannot be read."""
    check(smtp)
    watcher = Watcher(database, config, health, clock, newest)
    mailer = AlertMailer(database, smtp, watcher, health, clock)
    measures = RequestMeasures(registry)
    collector = WatchCollector(watcher, mailer)
    registry.register(collector)
    try:
        yield Watching(watcher, mailer, measures)
    finally:
        registry.unregister(collector)

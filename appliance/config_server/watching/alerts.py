"""Alert e-mail: every event that is bad enough is mailed once.

What is still to be mailed is a row without ``mailed_ns``: it survives a restart. The row is marked
after the SMTP server has taken the message; killed in between, the message is sent again under the
same Message-ID. That is the most that SMTP allows.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import ColumnElement, func, select, update

from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Event
from appliance.config_server.watching.config import SmtpConfig
from appliance.config_server.watching.mail import LISTED_MAX, Alert, compose
from appliance.config_server.watching.reason import Severity
from appliance.config_server.watching.rpo import NS
from appliance.config_server.watching.smtp import send
from appliance.config_server.watching.watcher import Watcher
from daemon.service import Health
from replication.errors import ReplicationError

HEALTH_PART = "alert e-mail"
MAILED_WITHIN_SECONDS = 86400
"""What is older is no news; so the first start with SMTP does not mail a whole table."""

RETRY_SECONDS_FIRST = 5.0
RETRY_SECONDS_MAX = 300.0
POLL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class _Batch:
    """Events up to ``last_id``; ``more_count`` of them are not listed."""

    alerts: tuple[Alert, ...]
    last_id: int
    more_count: int


class AlertMailer:
    """Mails events as they are opened, in the config server that watches.

    sent_count, failed_count: messages since the start.
    """

    def __init__(
        self,
        database: Database,
        config: SmtpConfig,
        watcher: Watcher,
        health: Health,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.sent_count = 0
        self.failed_count = 0
        self._database = database
        self._config = config
        self._watcher = watcher
        self._health = health
        self._clock = clock

    async def run(self) -> None:
        """Mail until cancelled; at once nothing to do where SMTP is not set."""
        if not self._config.host:
            return
        retry_seconds = RETRY_SECONDS_FIRST
        while True:
            try:
                sent = await self.send_due()
            except Exception as error:  # noqa: BLE001 - told by the health, a defect by the log
                self.failed_count += 1
                self._tell(error)
                await asyncio.sleep(retry_seconds)
                retry_seconds = min(2 * retry_seconds, RETRY_SECONDS_MAX)
                continue
            if sent:
                self._health.report(HEALTH_PART)
                retry_seconds = RETRY_SECONDS_FIRST
                await asyncio.sleep(self._config.gap_seconds)
            await self._wait()

    def _tell(self, error: Exception) -> None:
        told = str(error)
        if not isinstance(error, ReplicationError):
            told = f"alerts are not mailed, for a defect: {error!r}"
            structlog.get_logger().error("mailing has a defect", exc_info=error)
        self._health.report(HEALTH_PART, warning=told)

    async def send_due(self) -> int:
        """Mail what is due as one message; return how many events it told of."""
        batch = await self._read()
        if not batch.alerts or not await self._watcher.holds():
            return 0
        message = compose(
            batch.alerts,
            batch.more_count,
            sender=self._config.sender,
            to=self._config.to,
            now_ns=self._clock(),
        )
        refused = await send(message, self._config)
        await self._mark(batch.last_id)
        self.sent_count += 1
        log = structlog.get_logger()
        count = len(batch.alerts) + batch.more_count
        if refused:
            log.warning("an alert was refused for some", events=count, refused=sorted(refused))
        else:
            log.info("an alert was mailed", events=count)
        return count

    async def _wait(self) -> None:
        self._watcher.opened.clear()
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await self._watcher.opened.wait()
        except TimeoutError:
            return

    def _due(self) -> list[ColumnElement[bool]]:
        least = Severity(self._config.min_severity)
        severities = [severity for severity in Severity if severity.rank >= least.rank]
        return [
            Event.mailed_ns.is_(None),
            Event.severity.in_(severities),
            Event.at_ns > self._clock() - MAILED_WITHIN_SECONDS * NS,
        ]

    async def _read(self) -> _Batch:
        due = self._due()
        async with self._database.reading() as session:
            query = select(Event).where(*due).order_by(Event.id).limit(LISTED_MAX)
            alerts = tuple(_alert(row) for row in await session.scalars(query))
            count, last_id = (
                await session.execute(select(func.count(), func.max(Event.id)).where(*due))
            ).one()
        return _Batch(alerts, last_id or 0, max(0, count - len(alerts)))

    async def _mark(self, last_id: int) -> None:
        async with self._database.writing() as session:
            await session.execute(
                update(Event)
                .where(*self._due(), Event.id <= last_id)
                .values(mailed_ns=self._clock())
            )


def _alert(row: Any) -> Alert:
    return Alert(
        id=row.id,
        at_ns=row.at_ns,
        severity=Severity(row.severity),
        source=row.source,
        message=row.message,
        cause=row.cause,
        action=row.action,
        cleared_ns=row.cleared_ns,
    )

"""Looking at everything every few seconds, and writing the events that follow.

Every config server looks, for what it answers and measures; one of them, which holds the lease,
writes events.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from appliance.config_server.nodes.report_book import Heard
from appliance.config_server.store.engine import Database
from appliance.config_server.watching.assessment import (
    Assessment,
    EventKey,
    Memory,
    assess,
)
from appliance.config_server.watching.config import WatchingConfig
from appliance.config_server.watching.events import (
    Plan,
    plan_events,
    prune,
    read_marks,
    write_changes,
)
from appliance.config_server.watching.facts import FactReader
from appliance.config_server.watching.hysteresis import Mark
from appliance.config_server.watching.lease import LEASE_SECONDS, Lease, give_up, hold
from appliance.config_server.watching.reason import Severity, clean
from appliance.config_server.watching.rpo import NS
from daemon.service import Health
from replication.errors import IntegrityError, ReplicationError

HEALTH_PART = "watching"
PRUNE_SECONDS = 600.0
CURRENT_LOOKS_MAX = 3
RENEW_SECONDS = LEASE_SECONDS / 3


@dataclass(frozen=True, slots=True)
class _Held:
    """While the lease is ours: what is open, and when we last wrote."""

    marks: dict[EventKey, Mark]
    renewed_ns: int


class Watcher:
    """The newest assessment, and the loop that makes it.

    assessment: empty until the first look is done.
    look_seconds: what the newest look took.
    newest: what this config server has heard of a node; the rest is read from the table.
    """

    def __init__(
        self,
        database: Database,
        config: WatchingConfig,
        health: Health,
        clock: Callable[[], int] = time.time_ns,
        newest: Callable[[uuid.UUID], Heard | None] = lambda _node: None,
    ) -> None:
        self.holder = uuid.uuid4().hex
        self.assessment = Assessment()
        self.look_seconds = 0.0
        self.opened = asyncio.Event()
        self._database = database
        self._config = config
        self._health = health
        self._clock = clock
        self._reader = FactReader(database, newest)
        self._memory = Memory()
        self._held: _Held | None = None
        self._pruned_at = -PRUNE_SECONDS
        self._looking = asyncio.Lock()
        self._defect = ""

    def now_ns(self) -> int:
        """By the clock that the assessment is made with."""
        return self._clock()

    @property
    def open_counts(self) -> dict[Severity, int] | None:
        """Open events by severity; None where another config server watches."""
        if self._held is None:
            return None
        counts = dict.fromkeys(Severity, 0)
        for mark in self._held.marks.values():
            if mark.open is not None:
                counts[mark.open] += 1
        return counts

    async def run(self) -> None:
        """Look until cancelled. A database that is away is told, and tried again."""
        # Nodes that could not reach us while we were down need a moment to be heard of again.
        events_from = time.monotonic() + 2 * self._config.settle_seconds
        try:
            while True:
                began = time.monotonic()
                try:
                    assessment = await self.look(events=began >= events_from)
                    self._health.report(HEALTH_PART, critical=_told(assessment))
                    self._defect = ""
                except IntegrityError:
                    raise  # the database is damaged: whatever is read from it may be wrong
                except ReplicationError as error:
                    self._health.report(HEALTH_PART, warning=str(error))
                except Exception as error:  # noqa: BLE001 - told by the log and the health
                    self._tell_defect(error)
                self.look_seconds = time.monotonic() - began
                await asyncio.sleep(max(0.1, self._config.evaluate_seconds - self.look_seconds))
        finally:
            await self._give_up()

    def _tell_defect(self, error: Exception) -> None:
        """By health while it lasts, by the log once."""
        told = f"a defect: {error!r}"
        self._health.report(HEALTH_PART, critical=told)
        if told != self._defect:
            structlog.get_logger().error("a look has a defect", exc_info=error)
        self._defect = told

    async def look(self, *, events: bool = True) -> Assessment:
        """One look; with ``events``, what follows from it is written if the lease is ours."""
        async with self._looking:
            now_ns = self._clock()
            findings = await self._reader.read(now_ns)
            before = self.assessment.defects
            # In a thread: of a thousand machines it would keep every answer waiting.
            self.assessment, self._memory = await asyncio.to_thread(
                assess, findings, self._memory, now_ns
            )
            for source, defect in self.assessment.defects.items():
                if source not in before:
                    structlog.get_logger().error(
                        "health cannot be told", source=str(source), exc_info=defect
                    )
            if events:
                await self._follow_up(self.assessment)
            return self.assessment

    async def current(self) -> Assessment:
        """The newest assessment; a new one where that is old, as right after the start."""
        age_ns = self._clock() - self.assessment.at_ns
        if not 0 <= age_ns <= CURRENT_LOOKS_MAX * self._config.evaluate_seconds * NS:
            return await self.look(events=False)
        return self.assessment

    async def holds(self) -> bool:
        """True while the lease is ours; it is kept for a while by asking."""
        if self._held is None:
            return False
        async with self._database.writing() as session:
            if await hold(session, self.holder, self._clock()) is Lease.KEPT:
                return True
        self._held = None
        return False

    async def _follow_up(self, assessment: Assessment) -> None:
        if self._held is not None:
            plan = plan_events(self._held.marks, assessment, self._config.settling)
            age_ns = assessment.at_ns - self._held.renewed_ns
            is_fresh = 0 <= age_ns < RENEW_SECONDS * NS
            is_pruned = time.monotonic() - self._pruned_at < PRUNE_SECONDS
            if is_fresh and is_pruned and not plan.changes:
                self._held = _Held(plan.marks, self._held.renewed_ns)
                return
        await self._write(assessment)

    async def _write(self, assessment: Assessment) -> None:
        held, self._held = self._held, None
        async with self._database.writing() as session:
            lease = await hold(session, self.holder, assessment.at_ns)
            if lease is Lease.OTHERS:
                return
            is_continued = lease is Lease.KEPT and held is not None
            marks = held.marks if held and is_continued else await read_marks(session)
            plan: Plan = plan_events(marks, assessment, self._config.settling)
            await write_changes(session, plan.changes, assessment.at_ns)
            if time.monotonic() - self._pruned_at >= PRUNE_SECONDS:
                deleted = await prune(session, self._config, assessment.at_ns)
                if not deleted:
                    self._pruned_at = time.monotonic()
        self._held = _Held(plan.marks, assessment.at_ns)
        if any(change.reason for change in plan.changes):
            self.opened.set()

    async def _give_up(self) -> None:
        if self._held is None:
            return
        self._held = None
        try:
            async with self._database.writing() as session:
                await give_up(session, self.holder)
        except ReplicationError:
            return  # it runs out by itself


def _told(assessment: Assessment) -> str:
    """Of defects, which are ours and not those of what is watched."""
    names = {source: name for source, (name, _) in assessment.sources().items()}
    found = [clean(names.get(source, str(source))) for source in assessment.defects]
    return f"a defect: the health of {', '.join(sorted(found))} cannot be told" if found else ""

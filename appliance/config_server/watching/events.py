"""Events in the database: opened when a reason lasts, cleared when it is gone, bounded.

Source: docs/CONTROL.md §10.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.store.schema import Event
from appliance.config_server.watching.assessment import Assessment, EventKey
from appliance.config_server.watching.config import WatchingConfig
from appliance.config_server.watching.hysteresis import Mark, Settling, follow
from appliance.config_server.watching.reason import Code, Reason, Severity
from appliance.config_server.watching.rpo import NS

DELETED_AT_ONCE_MAX = 1000
_DAY_NS = 86400 * NS


@dataclass(frozen=True, slots=True)
class Change:
    """An event to open (``reason``) or to clear (None)."""

    key: EventKey
    source: str
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The marks after it, and what has to be written for them."""

    marks: dict[EventKey, Mark]
    changes: tuple[Change, ...]


def plan_events(marks: dict[EventKey, Mark], assessment: Assessment, settling: Settling) -> Plan:
    """What an assessment means for the events. A source that is gone has no reasons."""
    reasons = assessment.reasons()
    after: dict[EventKey, Mark] = {}
    changes: list[Change] = []
    for key in {**marks, **reasons}:
        name, reason = reasons.get(key, ("", None))
        before = marks.get(key, Mark())
        mark = follow(before, reason.severity if reason else None, assessment.at_ns, settling)
        if mark.open is not before.open:
            if before.open is not None:
                changes.append(Change(key, name, None))
            if mark.open is not None:
                changes.append(Change(key, name, reason))
        if not mark.is_idle:
            after[key] = mark
    return Plan(after, tuple(changes))


async def read_marks(session: AsyncSession) -> dict[EventKey, Mark]:
    """What is open, as an earlier watcher has left it."""
    query = select(Event.source_id, Event.code, Event.severity).where(
        Event.cleared_ns.is_(None), Event.source_id.is_not(None)
    )
    known = set(Code)
    return {
        (source_id, Code(code)): Mark(Severity(severity))
        for source_id, code, severity in await session.execute(query)
        if source_id is not None and code in known
    }


async def write_changes(session: AsyncSession, changes: Sequence[Change], now_ns: int) -> None:
    """Clear and open, in order."""
    for change in changes:
        source_id, code = change.key
        if change.reason is None:
            await session.execute(
                update(Event)
                .where(Event.source_id == source_id, Event.code == code, Event.cleared_ns.is_(None))
                .values(cleared_ns=now_ns)
            )
            continue
        session.add(_event(source_id, change.source, change.reason, now_ns))
        await session.flush()


def _event(source_id: uuid.UUID | None, source: str, reason: Reason, now_ns: int) -> Event:
    return Event(
        at_ns=now_ns,
        code=reason.code,
        severity=reason.severity,
        source_id=source_id,
        source=source,
        message=reason.message,
        cause=reason.cause,
        action=reason.action,
    )


async def prune(session: AsyncSession, config: WatchingConfig, now_ns: int) -> int:
    """Delete events that are over and too old, or too many; return how many, some at a time.

    Open ones stay: they are bounded by what there is to watch.
    """
    over = Event.cleared_ns.is_not(None)
    old = select(Event.id).where(over, Event.cleared_ns < now_ns - config.event_days * _DAY_NS)
    ids = list((await session.scalars(old.order_by(Event.id).limit(DELETED_AT_ONCE_MAX))).all())
    if not ids:
        count = await session.scalar(select(func.count()).select_from(Event)) or 0
        excess = min(count - config.event_count_max, DELETED_AT_ONCE_MAX)
        if excess > 0:
            oldest = select(Event.id).where(over).order_by(Event.id).limit(excess)
            ids = list((await session.scalars(oldest)).all())
    if ids:
        await session.execute(delete(Event).where(Event.id.in_(ids)))
    return len(ids)

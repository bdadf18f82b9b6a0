"""When a drill is due: every so many days at a time of the day, or as cron says; all in UTC.

Source: crontab(5); docs/RECOVERY.md §6.
"""

import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Self

from croniter import CroniterError, croniter
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

DAYS_MAX = 366
_NS = 10**9
_CRON = re.compile(r"(?:[0-9*/,-]|[A-Za-z]{3})+(?: (?:[0-9*/,-]|[A-Za-z]{3})+){4}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(2200, 1, 1, tzinfo=UTC)


class Timing(BaseModel):
    """``every_days`` with ``at``, or ``cron``; one of them.

    every_days: counted from the day ``first``, as 2026-12-01.
    at:         ``HH:MM`` in UTC.
    cron:       five fields: minute, hour, day of month, month, day of week.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    every_days: Annotated[int, Field(ge=1, le=DAYS_MAX)] | None = None
    at: Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")] | None = None
    first: (
        Annotated[str, StringConstraints(pattern=r"^20[0-9]{2}-[01][0-9]-[0-3][0-9]$")] | None
    ) = None
    cron: Annotated[str, StringConstraints(max_length=200)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if (self.cron is None) == (self.every_days is None):
            raise ValueError("give every_days with at, or cron")
        if self.cron is None:
            if self.at is None:
                raise ValueError("every_days needs at: a time of the day as 03:00, in UTC")
            if self.first is not None:
                date.fromisoformat(self.first)
        elif self.at is not None or self.first is not None:
            raise ValueError("at and first go with every_days, not with cron")
        else:
            _first_of(self.cron, _EPOCH)
        return self

    def told(self) -> str:
        """For people."""
        if self.cron is not None:
            return f"cron {self.cron}"
        days = "daily" if self.every_days == 1 else f"every {self.every_days} days"
        return f"{days} at {self.at} UTC"


def next_at(timing: Timing, after_ns: int) -> int:
    """The first moment after ``after_ns`` that it names; both in nanoseconds since 1970."""
    after = _EPOCH + timedelta(microseconds=after_ns // 1000)
    if timing.cron is not None:
        found = _first_of(timing.cron, after)
    else:
        assert timing.every_days is not None
        assert timing.at is not None
        found = _next_day(after, timing.every_days, time.fromisoformat(timing.at), timing.first)
    return int((found - _EPOCH).total_seconds()) * _NS


def _next_day(after: datetime, days: int, at: time, first: str | None) -> datetime:
    begin = datetime.combine(date.fromisoformat(first) if first else _EPOCH.date(), at, tzinfo=UTC)
    if after < begin:
        return begin
    periods = (after - begin) // timedelta(days=days) + 1
    return begin + periods * timedelta(days=days)


def _first_of(expression: str, after: datetime) -> datetime:
    """Raises ValueError for what is no cron expression, or names no moment at all."""
    if not _CRON.fullmatch(expression):
        raise ValueError(f"{expression!r:.80} has not the five fields of cron, as 0 3 * * 6")
    try:
        found = croniter(expression, after, max_years_between_matches=8).get_next(datetime)
    except (CroniterError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{expression!r:.80} is no cron expression: {error}") from error
    if not isinstance(found, datetime) or found > _LATEST:
        raise ValueError(f"{expression!r:.80} names no moment")
    return found

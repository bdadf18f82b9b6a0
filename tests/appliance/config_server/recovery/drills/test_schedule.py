"""When drills are due."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from appliance.config_server.recovery.drills.schedule import Timing, next_at

LEAP = {"first": "2024-02-29"}


def ns(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 10**9


@pytest.mark.parametrize(
    ("timing", "after", "due"),
    [
        ({"every_days": 1, "at": "03:00"}, "2026-11-28 02:59", "2026-11-28 03:00"),
        ({"every_days": 1, "at": "03:00"}, "2026-11-28 03:00", "2026-11-29 03:00"),
        ({"every_days": 7, "at": "00:00", "first": "2026-11-28"}, "2026-01-01", "2026-11-28"),
        ({"every_days": 7, "at": "00:00", "first": "2026-11-28"}, "2026-11-28", "2026-12-05"),
        ({"every_days": 30, "at": "23:59", **LEAP}, "2024-03-30", "2024-03-30 23:59"),
        ({"cron": "0 3 * * 6"}, "2026-11-28 03:00", "2026-12-05 03:00"),
        ({"cron": "*/15 * * * *"}, "2026-11-28 03:01", "2026-11-28 03:15"),
        ({"cron": "0 0 29 2 *"}, "2026-11-28", "2028-02-29"),
        ({"cron": "30 2 1 jan *"}, "2026-11-28", "2027-01-01 02:30"),
    ],
)  # fmt: skip
def test_the_next_moment_comes_after_now(timing: dict[str, Any], after: str, due: str) -> None:
    assert next_at(Timing.model_validate(timing), ns(after)) == ns(due)


@pytest.mark.parametrize(
    "timing",
    [
        {},
        {"every_days": 1},
        {"every_days": 0, "at": "03:00"},
        {"every_days": 1, "at": "24:00"},
        {"every_days": 1, "at": "03:00", "first": "2026-02-30"},
        {"every_days": 1, "at": "03:00", "cron": "0 3 * * *"},
        {"cron": "0 3 * * *", "at": "03:00"},
        {"cron": "0 3 * *"},
        {"cron": "0 3 * * * *"},
        {"cron": "61 3 * * *"},
        {"cron": "0 0 30 2 *"},
        {"cron": "@daily"},
        {"cron": "H H * * *"},
        {"cron": "R R * * *"},
        {"cron": "x y z a b"},
        {"cron": "1-1/0 * * * *"},
    ],
)
def test_what_names_no_moment_is_refused(timing: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Timing.model_validate(timing)


@given(st.integers(1, 366), st.datetimes(datetime(1980, 1, 1), datetime(2100, 1, 1)))  # noqa: DTZ001
def test_moments_are_so_many_days_apart(days: int, after: datetime) -> None:
    timing = Timing(every_days=days, at="12:30")
    first = next_at(timing, int(after.replace(tzinfo=UTC).timestamp()) * 10**9)
    second = next_at(timing, first)
    assert second - first == timedelta(days=days).total_seconds() * 10**9
    assert next_at(timing, second - 1) == second


@given(st.text(max_size=30))
def test_any_cron_text_is_taken_or_refused(text: str) -> None:
    try:
        timing = Timing(cron=text)
    except ValidationError:
        return
    assert next_at(timing, ns("2026-11-28")) > ns("2026-11-28")

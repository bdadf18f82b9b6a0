"""Every limit at its edge: on it is well, beyond it is not."""

import dataclasses
import math

import pytest

from appliance.config_server.watching.reason import Severity
from appliance.config_server.watching.thresholds import THRESHOLDS, Limit

LIMITS = [
    (field.name, getattr(THRESHOLDS, field.name))
    for field in dataclasses.fields(THRESHOLDS)
    if isinstance(getattr(THRESHOLDS, field.name), Limit)
]
FALLING = {"spool_free_share", "certificate_seconds", "store_free_share", "store_free_bytes"}


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_edges(name: str, limit: Limit) -> None:
    judge = limit.below if name in FALLING else limit.above
    beyond = -math.inf if name in FALLING else math.inf
    assert judge(limit.warning) is None
    assert judge(math.nextafter(limit.warning, beyond)) is Severity.WARNING
    assert judge(limit.critical) is Severity.WARNING
    if math.isfinite(limit.critical):
        assert judge(math.nextafter(limit.critical, beyond)) is Severity.CRITICAL


@pytest.mark.parametrize(("name", "limit"), LIMITS)
def test_critical_is_worse_than_warning(name: str, limit: Limit) -> None:
    assert (limit.critical < limit.warning) == (name in FALLING)


def test_figures_are_those_of_azure_site_recovery() -> None:
    assert THRESHOLDS.cpu_share == THRESHOLDS.memory_share == Limit(0.80, 0.95)
    assert THRESHOLDS.spool_free_share == Limit(0.30, 0.25)
    assert THRESHOLDS.backlog_seconds == Limit(1800, 2700)
    assert THRESHOLDS.silent_seconds_critical == 900
    assert THRESHOLDS.crash_point_seconds_max == 3600


@pytest.mark.parametrize(
    ("seconds", "interval", "expected"),
    [
        (45, 15, None),
        (45.001, 15, Severity.WARNING),
        (900, 15, Severity.WARNING),
        (900.001, 15, Severity.CRITICAL),
        (1200, 400, None),
        (1200.001, 400, Severity.CRITICAL),
        (-5, 15, None),
    ],
)
def test_silence(seconds: float, interval: float, expected: Severity | None) -> None:
    """A slow interval is never critical before three of it have passed."""
    assert THRESHOLDS.silent(seconds, interval) is expected

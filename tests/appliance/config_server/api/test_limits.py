"""Token buckets and waits, by a clock of the tests' own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.api import limits
from appliance.config_server.api.limits import Attempts, Rates, source_of
from replication.errors import LimitError


class Now:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@given(
    st.floats(0.1, 100),
    st.integers(1, 50),
    st.lists(st.floats(0, 5), min_size=1, max_size=200),
)
def test_no_source_gets_more_than_its_rate_and_burst(
    per_second: float, burst: int, pauses: list[float]
) -> None:
    now = Now()
    rates = Rates(per_second, burst, now=now)
    taken = 0
    for pause in pauses:
        now.seconds += pause
        taken += rates.take("a") == 0
    assert taken <= burst + per_second * (now.seconds - 1000.0) + 1e-6


@given(st.floats(0.1, 100), st.integers(1, 20))
def test_who_waits_as_long_as_told_may_ask(per_second: float, burst: int) -> None:
    now = Now()
    rates = Rates(per_second, burst, now=now)
    for _ in range(burst):
        assert rates.take("a") == 0
    wait = rates.take("a")
    assert 0 < wait <= 1 / per_second + 1e-9
    now.seconds += wait + 1e-6
    assert rates.take("a") == 0
    assert rates.take("b") == 0


def test_sources_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SOURCES_MAX", 10)
    rates, attempts = Rates(1, 1), Attempts()
    for index in range(1000):
        rates.take(str(index))
        attempts.failed(f"10.0.0.{index % 250}")
    assert len(rates._buckets) <= 10
    assert len(attempts._sources) <= 10


def test_each_failure_doubles_the_wait_up_to_its_limit() -> None:
    now = Now()
    attempts = Attempts(now=now)
    for _ in range(limits.FREE_FAILURES):
        attempts.failed("a")
        attempts.check("a")
    waits = []
    for _ in range(40):
        attempts.failed("a")
        with pytest.raises(LimitError) as told:
            attempts.check("a")
        waits.append(told.value.retry_after_seconds)
        now.seconds += waits[-1]
        attempts.check("a")
        attempts.check("b")
    assert waits[:5] == pytest.approx([1, 2, 4, 8, 16])
    assert max(waits) == limits.WAIT_SECONDS_MAX


def test_what_was_wrong_long_ago_is_forgotten() -> None:
    now = Now()
    attempts = Attempts(now=now)
    for _ in range(10):
        attempts.failed("a")
    now.seconds += limits.FORGET_SECONDS + 1
    attempts.failed("a")
    attempts.check("a")


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("", ""),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_source_is_what_one_host_owns(address: str, source: str) -> None:
    assert source_of(address) == source

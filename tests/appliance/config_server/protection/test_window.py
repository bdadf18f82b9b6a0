import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.protection.window import DAY_MINUTES, Window, resync_allowed
from replication.errors import ConfigError

MINUTE_NS = 60 * 10**9


def at(hour: int, minute: int) -> int:
    return (20_000 * DAY_MINUTES + hour * 60 + minute) * MINUTE_NS


@pytest.mark.parametrize(
    ("window", "clock", "is_open"),
    [
        ("22:00-06:00", (21, 59), False),
        ("22:00-06:00", (22, 0), True),
        ("22:00-06:00", (23, 59), True),
        ("22:00-06:00", (0, 0), True),
        ("22:00-06:00", (5, 59), True),
        ("22:00-06:00", (6, 0), False),
        ("09:30-10:00", (9, 29), False),
        ("09:30-10:00", (9, 30), True),
        ("09:30-10:00", (10, 0), False),
        ("always", (12, 0), True),
    ],
)
def test_window_is_open_from_its_first_minute_up_to_its_last(
    window: str, clock: tuple[int, int], is_open: bool
) -> None:
    assert resync_allowed(window, at(*clock)) is is_open


@pytest.mark.parametrize("text", ["", "22-06", "24:00-06:00", "22:00-06:60", "22:00 - 06:00", "a"])
def test_other_forms_are_refused_with_the_form_that_is_right(text: str) -> None:
    with pytest.raises(ConfigError, match="HH:MM-HH:MM"):
        Window.parse(text)


def test_a_window_without_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="ends when it begins"):
        Window.parse("22:00-22:00")


minutes = st.integers(0, DAY_MINUTES - 1)


@given(start=minutes, end=minutes, now=st.integers(0, 4 * 10**18))
def test_the_next_opening_is_the_first_open_minute(start: int, end: int, now: int) -> None:
    window = Window(start, end)
    opens = window.opens_ns(now)
    assert window.is_open(opens)
    assert 0 <= opens - now < DAY_MINUTES * MINUTE_NS
    if opens > now:
        assert not window.is_open(now)
        assert not window.is_open(opens - 1)

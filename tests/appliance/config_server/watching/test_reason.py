"""Reasons are whole, and safe to show anywhere."""

import pytest

from appliance.config_server.watching.reason import (
    KINDS,
    MESSAGE_CHARS_MAX,
    Code,
    Severity,
    State,
    clean,
    duration,
    health_of,
    reason,
)


def test_each_code_has_a_cause_and_an_action() -> None:
    assert set(KINDS) == set(Code)
    assert all(kind.cause and kind.action for kind in KINDS.values())
    assert all(len(code) <= 64 for code in Code)


def test_the_worst_reason_is_the_state_and_comes_first() -> None:
    mild = reason(Code.CPU_HIGH, Severity.WARNING, "CPU use is 81 %")
    bad = reason(Code.NODE_SILENT, Severity.CRITICAL, "gone")
    found = health_of([mild, None, bad])
    assert found.state is State.CRITICAL
    assert found.reasons == (bad, mild)
    assert health_of([None, mild]).state is State.WARNING
    assert health_of([None]).state is State.NORMAL


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("two\r\nlines", "two lines"),
        ("\x1b[2J red", "[2J red"),
        ("a\u202eb\u2028c", "a b c"),
        ("  spaces\t here ", "spaces here"),
        ("", ""),
    ],
)
def test_what_nodes_say_becomes_one_plain_line(given: str, shown: str) -> None:
    assert clean(given) == shown
    assert reason(Code.AGENT_TROUBLE, Severity.WARNING, given).message == shown


def test_length_is_bounded() -> None:
    assert len(clean("x" * 100_000)) == MESSAGE_CHARS_MAX


def test_a_better_known_cause_replaces_the_usual_one() -> None:
    assert reason(Code.CPU_HIGH, Severity.WARNING, "m").cause == KINDS[Code.CPU_HIGH].cause
    assert reason(Code.CPU_HIGH, Severity.WARNING, "m", cause="mine").cause == "mine"


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-3, "0 s"),
        (0.9, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (3660, "1 h 1 min"),
        (86399, "23 h 59 min"),
        (86400, "1 d"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds: float, told: str) -> None:
    assert duration(seconds) == told

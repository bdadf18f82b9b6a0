from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.protection.policy import (
    DAY,
    HOUR,
    PolicyError,
    PolicySettings,
    Problem,
    changed,
    check_name,
    check_settings,
)


def keys(changes: dict[str, Any], *, lab: bool = False) -> set[str]:
    """Of the problems that settings have."""
    refused: tuple[Problem, ...] = ()
    try:
        check_settings(changed(PolicySettings(), changes), allow_short_crash_frequency=lab)
    except PolicyError as error:
        refused = error.problems
    assert all(each.reason for each in refused)
    return {each.key for each in refused}


def test_defaults_are_those_of_site_recovery() -> None:
    assert PolicySettings() == PolicySettings(900, DAY, 300, 0, "22:00-06:00")
    assert keys({}) == set()


@pytest.mark.parametrize(
    "changes",
    [
        {"retention_seconds": 3 * DAY},
        {"retention_seconds": 15 * DAY},
        {"retention_seconds": HOUR},
        {"app_frequency_seconds": HOUR},
        {"app_frequency_seconds": 12 * HOUR},
        {"retention_seconds": 2 * HOUR, "app_frequency_seconds": HOUR},
        {"resync_window": "always"},
        {"rpo_threshold_seconds": 60},
    ],
)
def test_sensible_values_are_taken(changes: dict[str, Any]) -> None:
    assert keys(changes) == set()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"retention_seconds": 15 * DAY + 1}, "retention_seconds"),
        ({"retention_seconds": HOUR - 1}, "retention_seconds"),
        ({"crash_frequency_seconds": 60}, "crash_frequency_seconds"),
        ({"crash_frequency_seconds": 600}, "crash_frequency_seconds"),
        ({"app_frequency_seconds": HOUR - 1}, "app_frequency_seconds"),
        ({"app_frequency_seconds": 12 * HOUR + 1}, "app_frequency_seconds"),
        ({"app_frequency_seconds": -1}, "app_frequency_seconds"),
        ({"app_frequency_seconds": HOUR, "retention_seconds": HOUR}, "app_frequency_seconds"),
        ({"rpo_threshold_seconds": 59}, "rpo_threshold_seconds"),
        ({"rpo_threshold_seconds": DAY + 1}, "rpo_threshold_seconds"),
        ({"resync_window": "22-06"}, "resync_window"),
    ],
)
def test_senseless_values_are_refused_by_key(changes: dict[str, Any], key: str) -> None:
    assert keys(changes) == {key}


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(PolicyError, match=r"retention_seconds: .*; resync_window: "):
        check_settings(PolicySettings(900, 0, 300, 0, ""), allow_short_crash_frequency=False)
    assert keys({"retention_seconds": 0, "resync_window": "", "rpo_threshold_seconds": 0}) == {
        "retention_seconds",
        "resync_window",
        "rpo_threshold_seconds",
    }


def test_a_lab_may_be_quicker_but_not_slower() -> None:
    short = {"crash_frequency_seconds": 10, "retention_seconds": 600, "app_frequency_seconds": 30}
    assert keys(short, lab=True) == set()
    assert keys({"crash_frequency_seconds": 301}, lab=True) == {"crash_frequency_seconds"}
    assert keys({"crash_frequency_seconds": 0}, lab=True) == {"crash_frequency_seconds"}


@given(
    retention=st.integers(-1, 20 * DAY),
    app=st.integers(-1, 20 * HOUR),
)
def test_what_is_taken_always_has_an_app_consistent_point_to_restore(
    retention: int, app: int
) -> None:
    if not keys({"retention_seconds": retention, "app_frequency_seconds": app}):
        assert 0 <= app < retention <= 15 * DAY


@pytest.mark.parametrize("name", ["gold", "Gold 24 h", "a", "x" * 64, "tier-1_v2.0"])
def test_names_that_fit_are_taken(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", " x", "x ", "a/b", "x" * 65, "gold-failback", "é", "a\n"])
def test_names_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(PolicyError, match="name"):
        check_name(name)

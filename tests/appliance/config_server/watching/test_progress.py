"""What is remembered between two looks."""

import pytest

from appliance.config_server.watching.progress import (
    AppExpectation,
    Progress,
    follow_app_expectation,
    follow_progress,
)
from replication.control.report import MachineReport, Phase


def report(phase: Phase = Phase.INITIAL, **figures: int) -> MachineReport:
    return MachineReport.model_validate({"time_ns": 1, "phase": phase, **figures})


@pytest.mark.parametrize(
    "phase", [Phase.IDLE, Phase.REPLICATING, Phase.RESYNC_REQUIRED, Phase.FAILED]
)
def test_nothing_is_expected_where_nothing_is_copied(phase: Phase) -> None:
    assert follow_progress(None, report(phase), 5) is None


def test_nothing_is_expected_of_who_never_reported() -> None:
    assert follow_progress(Progress((), 1), None, 5) is None


@pytest.mark.parametrize("phase", [Phase.INITIAL, Phase.RESYNCHRONISING])
@pytest.mark.parametrize(
    "moved",
    [{"done_bytes": 1}, {"todo_bytes": 1}, {"sent_bytes": 1}, {"generation": 2}, {"committed": 1}],
)
def test_any_figure_that_changes_is_progress(phase: Phase, moved: dict[str, int]) -> None:
    first = follow_progress(None, report(phase), 5)
    same = follow_progress(first, report(phase), 9)
    assert first == same
    assert same is not None
    after = follow_progress(same, report(phase, **moved), 11)
    assert after is not None
    assert (same.since_ns, after.since_ns) == (5, 11)


def test_another_phase_begins_anew() -> None:
    first = follow_progress(None, report(Phase.INITIAL), 5)
    after = follow_progress(first, report(Phase.RESYNCHRONISING), 9)
    assert after is not None
    assert after.since_ns == 9


def test_app_points_are_expected_from_when_they_were_asked_for() -> None:
    first = follow_app_expectation(None, 3600, 100, 5000)
    assert first == AppExpectation(3600, 100)
    assert follow_app_expectation(first, 3600, 100, 6000) == first
    assert follow_app_expectation(first, 7200, 100, 7000) == AppExpectation(7200, 7000)

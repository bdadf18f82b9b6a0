"""A machine's health at every edge."""

import dataclasses
import uuid
from typing import Any

import pytest

from appliance.config_server.protection.table import RECOVERING
from appliance.config_server.protection.table import State as Protection
from appliance.config_server.watching.failover_health import NO_FAILOVERS, FailoverFacts
from appliance.config_server.watching.health import (
    HAS_POINTS,
    WATCHED,
    MachineFacts,
    Part,
    machine_health,
    machine_rpo,
)
from appliance.config_server.watching.progress import AppExpectation, Progress
from appliance.config_server.watching.reason import Code, Reason, Severity, State
from appliance.config_server.watching.rpo import NO_RPO, NS
from replication.control.report import (
    MachineReport,
    Phase,
    ResyncCause,
    StoreReport,
    StreamReport,
    Trouble,
)

NOW = 1_800_000_000 * NS
MACHINE = uuid.UUID("6f1c1a0e-93a4-4c0e-9f57-0d4b8a1c2e3f")
DAY = 86400


def ago(seconds: float) -> int:
    return NOW - int(seconds * NS)


def report(**changes: Any) -> MachineReport:
    fields: dict[str, Any] = {
        "time_ns": ago(1),
        "phase": Phase.REPLICATING,
        "consistency": "crash-consistent",
        "durable_ns": ago(5),
        "restorable_ns": ago(8),
    }
    return MachineReport(**(fields | changes))


WELL = MachineFacts(
    id=MACHINE,
    name="db-01",
    state=Protection.PROTECTED,
    since_ns=ago(30 * DAY),
    rpo_threshold_seconds=900,
    report=report(),
    received_ns=ago(1),
    process_server=Part("ps-1", State.NORMAL),
    applier=Part("applier-1", State.NORMAL),
    certificate_ns=ago(-60 * DAY),
)


def health(**changes: Any) -> dict[Code, Reason]:
    found = machine_health(dataclasses.replace(WELL, **changes), NOW)
    reasons = {reason.code: reason for reason in found.reasons}
    assert len(reasons) == len(found.reasons), "one reason a code: it is the event's key"
    worst = max((reason.severity.rank for reason in found.reasons), default=0)
    assert list(State).index(found.state) == worst
    return reasons


def severity(code: Code, **changes: Any) -> Severity | None:
    found = health(**changes)
    assert set(found) <= {code}, "nothing else may be wrong here"
    return found[code].severity if found else None


def test_a_machine_that_is_well_has_no_reason() -> None:
    assert health() == {}


@pytest.mark.parametrize("state", list(Protection))
def test_only_what_should_be_heard_of_can_be_silent(state: Protection) -> None:
    found = health(state=state, report=None, received_ns=0)
    assert (Code.AGENT_SILENT in found) == (state in WATCHED)


def test_nobody_minds_the_certificate_troubles_or_clock_of_an_unprotected_machine() -> None:
    assert not health(
        state=Protection.UNPROTECTED,
        certificate_ns=ago(5),
        report=report(
            time_ns=ago(90000), troubles=(Trouble(part="x", severity="critical", reason="y"),)
        ),
    )


SILENCE = [
    (45, None),
    (45.001, Severity.WARNING),
    (900, Severity.WARNING),
    (900.001, Severity.CRITICAL),
]


@pytest.mark.parametrize(("seconds", "expected"), SILENCE)
def test_agent_not_heard_of(seconds: float, expected: Severity | None) -> None:
    heard = report(time_ns=ago(seconds), durable_ns=ago(5), restorable_ns=ago(5))
    assert severity(Code.AGENT_SILENT, report=heard, received_ns=ago(seconds)) is expected


@pytest.mark.parametrize(("seconds", "expected"), SILENCE)
def test_agent_that_never_reported_counts_from_its_protection(
    seconds: float, expected: Severity | None
) -> None:
    found = severity(
        Code.AGENT_SILENT,
        state=Protection.ENABLING,
        report=None,
        received_ns=0,
        since_ns=ago(seconds),
    )
    assert found is expected


RPO = [
    (900, None),
    (900.001, Severity.WARNING),
    (1800, Severity.WARNING),
    (1800.001, Severity.CRITICAL),
]


@pytest.mark.parametrize(("seconds", "expected"), RPO)
def test_rpo_durable_above_the_policys_threshold(seconds: float, expected: Severity | None) -> None:
    assert severity(Code.RPO_EXCEEDED, report=report(durable_ns=ago(seconds))) is expected


@pytest.mark.parametrize("skew", [-300, -3, 3, 300])
@pytest.mark.parametrize(("seconds", "expected"), RPO)
def test_rpo_is_by_the_sources_clock(skew: int, seconds: float, expected: Severity | None) -> None:
    skewed = report(
        time_ns=ago(1) + skew * NS,
        durable_ns=ago(seconds) + skew * NS,
        restorable_ns=ago(5) + skew * NS,
    )
    found = health(report=skewed)
    assert (found[Code.RPO_EXCEEDED].severity if Code.RPO_EXCEEDED in found else None) is expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(1800, None), (1800.001, Severity.WARNING), (3600, Severity.WARNING)]
)
def test_rpo_restorable_far_above_it(seconds: float, expected: Severity | None) -> None:
    assert severity(Code.RESTORABLE_LATE, report=report(restorable_ns=ago(seconds))) is expected


def test_the_newest_that_anybody_knows_of_counts() -> None:
    old = report(durable_ns=ago(5000), restorable_ns=ago(5000))
    stream = StreamReport(machine=MACHINE, durable_ns=ago(10))
    store = StoreReport(machine=MACHINE, newest_ns=ago(20))
    facts = dataclasses.replace(WELL, report=old, stream=stream, store=store)
    rpo = machine_rpo(facts, NOW)
    assert (rpo.durable_seconds, rpo.restorable_seconds) == (10, 20)
    assert machine_health(facts, NOW).state is State.NORMAL


@pytest.mark.parametrize("state", list(Protection))
def test_rpo_is_told_where_there_are_points(state: Protection) -> None:
    found = machine_rpo(dataclasses.replace(WELL, state=state), NOW)
    assert (found != NO_RPO) == (state in HAS_POINTS)


def test_without_a_policy_no_rpo_is_too_long() -> None:
    found = health(rpo_threshold_seconds=0, report=report(durable_ns=ago(DAY)))
    assert Code.RPO_EXCEEDED not in found


@pytest.mark.parametrize(("seconds", "expected"), [(3600, None), (3600.001, Severity.CRITICAL)])
def test_no_crash_consistent_point_for_an_hour(seconds: float, expected: Severity | None) -> None:
    late = report(restorable_ns=ago(seconds))
    assert severity(Code.NO_CRASH_POINT, report=late, rpo_threshold_seconds=0) is expected
    never = report(restorable_ns=0)
    assert (
        severity(Code.NO_CRASH_POINT, report=never, since_ns=ago(seconds), rpo_threshold_seconds=0)
        is expected
    )


@pytest.mark.parametrize("state", list(Protection))
def test_points_are_missed_only_where_there_should_be_some(state: Protection) -> None:
    found = health(state=state, report=report(restorable_ns=0), app_frequency_seconds=3600)
    assert (Code.NO_CRASH_POINT in found) == (state in HAS_POINTS)
    assert (Code.NO_APP_POINT in found) == (state in HAS_POINTS)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(3600 + 900, None), (3600 + 900.001, Severity.WARNING)]
)
@pytest.mark.parametrize("told_by", ["agent", "applier"])
def test_app_consistent_point_missing(
    seconds: float, expected: Severity | None, told_by: str
) -> None:
    at = ago(seconds)
    found = severity(
        Code.NO_APP_POINT,
        app_frequency_seconds=3600,
        report=report(app_consistent_ns=at if told_by == "agent" else 0),
        store=StoreReport(
            machine=MACHINE, newest_ns=ago(5), newest_app_ns=at if told_by == "applier" else 0
        ),
    )
    assert found is expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(3600 + 900, None), (3600 + 900.001, Severity.WARNING)]
)
def test_app_consistent_points_are_expected_from_when_they_are_asked_for(
    seconds: float, expected: Severity | None
) -> None:
    changed = severity(
        Code.NO_APP_POINT,
        app_frequency_seconds=3600,
        app_expectation=AppExpectation(3600, ago(seconds)),
    )
    protected = severity(Code.NO_APP_POINT, app_frequency_seconds=3600, since_ns=ago(seconds))
    assert changed is protected is expected


def test_app_consistent_points_that_are_off_are_not_missed() -> None:
    assert health(app_frequency_seconds=0) == {}


def test_changesets_that_make_no_points() -> None:
    found = health(report=report(consistency="none", reason="sdb has no file system"))
    assert found[Code.POINTS_INCONSISTENT].severity is Severity.WARNING
    assert found[Code.POINTS_INCONSISTENT].cause == "sdb has no file system"
    assert not health(report=report(consistency="none", phase=Phase.INITIAL))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, Severity.WARNING), (DAY, Severity.WARNING), (DAY + 0.001, Severity.CRITICAL)],
)
def test_resync_required(seconds: float, expected: Severity) -> None:
    found = severity(
        Code.RESYNC_REQUIRED,
        state=Protection.RESYNC_REQUIRED,
        since_ns=ago(seconds),
        cause="disk-resized",
    )
    assert found is expected


@pytest.mark.parametrize("cause", list(ResyncCause))
def test_each_cause_of_a_resync_has_words(cause: ResyncCause) -> None:
    by_row = health(
        state=Protection.RESYNC_REQUIRED, cause=cause.value, reason="disk 0: 1 to 2 GiB"
    )
    by_report = health(
        state=Protection.RESYNC_REQUIRED, report=report(cause=cause, reason="disk 0: 1 to 2 GiB")
    )
    for found in (by_row[Code.RESYNC_REQUIRED], by_report[Code.RESYNC_REQUIRED]):
        assert f"({cause.value})" in found.message
        assert found.cause.endswith(": disk 0: 1 to 2 GiB")
        assert not found.cause.startswith(":")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (900, None),
        (900.001, Severity.WARNING),
        (3600, Severity.WARNING),
        (3600.001, Severity.CRITICAL),
    ],
)
@pytest.mark.parametrize(
    ("phase", "state", "what"),
    [
        (Phase.INITIAL, Protection.INITIAL_REPLICATION, "initial replication"),
        (Phase.RESYNCHRONISING, Protection.RESYNCHRONISING, "resync"),
    ],
)
def test_copying_without_progress(
    seconds: float, expected: Severity | None, phase: Phase, state: Protection, what: str
) -> None:
    changes = {
        "state": state,
        "report": report(phase=phase),
        "progress": Progress((), ago(seconds)),
    }
    assert severity(Code.NO_PROGRESS, **changes) is expected
    if expected:
        assert health(**changes)[Code.NO_PROGRESS].message.startswith(f"{what} has not moved")


def test_replication_that_failed() -> None:
    found = health(report=report(phase=Phase.FAILED, reason="disk sdb is gone"))
    assert found[Code.REPLICATION_FAILED].severity is Severity.CRITICAL
    assert "disk sdb is gone" in found[Code.REPLICATION_FAILED].message


def test_troubles_of_the_agent_are_one_reason_worst_first() -> None:
    mild = Trouble(part="capture", severity="warning", reason="slow")
    bad = Trouble(part="process server", severity="critical", reason="refuses us")
    found = health(report=report(troubles=(mild, bad)))[Code.AGENT_TROUBLE]
    assert found.severity is Severity.CRITICAL
    assert found.message == "process server: refuses us; capture: slow"
    assert severity(Code.AGENT_TROUBLE, report=report(troubles=(mild,))) is Severity.WARNING


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (10, None),
        (10.001, Severity.WARNING),
        (300, Severity.WARNING),
        (300.001, Severity.CRITICAL),
    ],
)
@pytest.mark.parametrize("way", [1, -1])
def test_clock_skew(seconds: float, expected: Severity | None, way: int) -> None:
    shift = way * int(seconds * NS)
    skewed = report(time_ns=ago(1) + shift, durable_ns=ago(5) + shift, restorable_ns=ago(5) + shift)
    assert severity(Code.CLOCK_SKEW, report=skewed) is expected
    if expected:
        told = health(report=skewed)[Code.CLOCK_SKEW].message
        assert ("ahead of" in told) == (way > 0)


@pytest.mark.parametrize(
    ("days", "expected"),
    [
        (14, None),
        (13.999, Severity.WARNING),
        (3, Severity.WARNING),
        (2.999, Severity.CRITICAL),
        (-1, Severity.CRITICAL),
    ],
)
def test_certificate_that_ends(days: float, expected: Severity | None) -> None:
    assert severity(Code.CERTIFICATE_ENDS, certificate_ns=ago(-days * DAY)) is expected


@pytest.mark.parametrize("state", list(State))
def test_a_critical_component_shows_at_its_machines_but_makes_no_event_there(state: State) -> None:
    for code, part in (
        (Code.PROCESS_SERVER_UNWELL, "process_server"),
        (Code.APPLIER_UNWELL, "applier"),
    ):
        found = health(**{part: Part("it", state)})
        assert (code in found) == (state is State.CRITICAL)
        assert not any(reason.opens_event for reason in found.values())


def test_what_the_applier_says_of_the_store() -> None:
    lost = StoreReport(machine=MACHINE, newest_ns=ago(5), lost="changeset 7 is missing")
    assert severity(Code.STORE_LOST, store=lost) is Severity.CRITICAL
    repairs = StoreReport(machine=MACHINE, newest_ns=ago(5), open_repairs=1)
    assert severity(Code.STORE_REPAIRS, store=repairs) is Severity.WARNING
    assert health(store=StoreReport(machine=MACHINE, newest_ns=ago(5))) == {}


def test_a_failed_job_shows_also_when_nothing_is_protected() -> None:
    assert severity(Code.JOB_FAILED, failed_job="protect failed: no disk") is Severity.WARNING
    found = severity(
        Code.JOB_FAILED, state=Protection.UNPROTECTED, failed_job="protect failed: no disk"
    )
    assert found is Severity.WARNING


def told(state: Protection, failovers: FailoverFacts, *, at_ns: int) -> dict[Code, Severity]:
    facts = MachineFacts(
        id=uuid.UUID(int=1), name="web-1", state=state, since_ns=0, failovers=failovers
    )
    return {reason.code: reason.severity for reason in machine_health(facts, at_ns).reasons}


DAY_NS = 86400 * 10**9


def test_a_failover_that_failed_is_critical_and_a_test_a_warning() -> None:
    failed = FailoverFacts(failed="no room")
    for state in (Protection.UNPROTECTED, Protection.FAILED_OVER, Protection.PROTECTED):
        assert told(state, failed, at_ns=1)[Code.FAILOVER_FAILED] is Severity.CRITICAL
    tested = FailoverFacts(failed="no room", is_test=True)
    assert told(Protection.PROTECTED, tested, at_ns=1)[Code.FAILOVER_FAILED] is Severity.WARNING


def test_a_test_that_nobody_cleans_up_is_told_after_a_day() -> None:
    facts = FailoverFacts(test_since_ns=1)
    assert Code.TEST_NOT_CLEANED not in told(Protection.PROTECTED, facts, at_ns=DAY_NS)
    found = told(Protection.PROTECTED, facts, at_ns=2 * DAY_NS)
    assert found[Code.TEST_NOT_CLEANED] is Severity.WARNING


def test_of_a_machine_that_is_failed_over_only_the_decision_is_missed() -> None:
    facts = FailoverFacts(uncommitted_since_ns=1)
    assert told(Protection.FAILED_OVER, facts, at_ns=DAY_NS) == {}
    assert told(Protection.FAILED_OVER, facts, at_ns=2 * DAY_NS) == {
        Code.NOT_COMMITTED: Severity.WARNING
    }
    assert told(Protection.FAILED_OVER, facts, at_ns=8 * DAY_NS) == {
        Code.NOT_COMMITTED: Severity.CRITICAL
    }
    for state in RECOVERING:
        assert told(state, NO_FAILOVERS, at_ns=8 * DAY_NS) == {}

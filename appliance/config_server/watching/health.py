"""The health of a machine: a pure function of what is known of it and the clock.

Source: docs/CONTROL.md §10.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from appliance.config_server.protection.table import RECOVERING, RESYNCING
from appliance.config_server.protection.table import State as Protection
from appliance.config_server.watching.failover_health import (
    NO_FAILOVERS,
    FailoverFacts,
    failover_reasons,
)
from appliance.config_server.watching.node_health import (
    certificate_reason,
    silence_reason,
    skew_reason,
    trouble_reason,
)
from appliance.config_server.watching.progress import AppExpectation, Progress
from appliance.config_server.watching.reason import (
    Code,
    Health,
    Reason,
    Severity,
    State,
    clean,
    duration,
    health_of,
    reason,
)
from appliance.config_server.watching.rpo import NO_RPO, NS, Rpo, Sighting, rpo_seconds
from appliance.config_server.watching.thresholds import THRESHOLDS, Thresholds
from replication.control.report import (
    REPORT_SECONDS_DEFAULT,
    MachineReport,
    Phase,
    ResyncCause,
    StoreReport,
    StreamReport,
)

WATCHED = frozenset(Protection) - {Protection.UNPROTECTED} - RECOVERING
"""States in which the agent must be heard of: the source of a failover is off, or gone."""

HAS_POINTS = frozenset({Protection.PROTECTED, *RESYNCING})
"""States in which there are points, which grow old."""

_NO_CONSISTENCY = "none"
_RESYNC_CAUSES = {
    ResyncCause.UNCLEAN_SHUTDOWN: "it was not shut down in order",
    ResyncCause.DISK_RESIZED: "a disk has another size",
    ResyncCause.DISKS_CHANGED: "its disks are not the same ones",
    ResyncCause.TRACKING_LOST: "tracking was interrupted",
    ResyncCause.INTEGRITY: "blocks differ that no change accounts for",
    ResyncCause.STREAM_LOST: "the stream has a gap",
    ResyncCause.OPERATOR: "somebody asked for it",
}


@dataclass(frozen=True, slots=True)
class Part:
    """A component that a machine's replication depends on."""

    name: str
    state: State


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """All that a machine's health depends on.

    state, since_ns, cause, reason: of its row; the state is one of protection/table.py.
    received_ns:       when the report came, by our clock; 0: none ever came.
    stream, store:     what its process server and its applier have of it.
    certificate_ns:    when its newest good certificate ends; 0: it has none.
    failed_job:        the error of its newest job, where that failed.
    failovers:         what its failovers have come to.
    """

    id: uuid.UUID
    name: str
    state: Protection
    since_ns: int
    cause: str = ""
    reason: str = ""
    rpo_threshold_seconds: int = 0
    app_frequency_seconds: int = 0
    report: MachineReport | None = None
    received_ns: int = 0
    stream: StreamReport | None = None
    store: StoreReport | None = None
    process_server: Part | None = None
    applier: Part | None = None
    progress: Progress | None = None
    app_expectation: AppExpectation | None = None
    certificate_ns: int = 0
    failed_job: str = ""
    failovers: FailoverFacts = NO_FAILOVERS
    interval_seconds: float = REPORT_SECONDS_DEFAULT

    @property
    def sighting(self) -> Sighting | None:
        if self.report is None:
            return None
        return Sighting(self.report.time_ns, self.received_ns)


def machine_rpo(facts: MachineFacts, now_ns: int) -> Rpo:
    """Of the newest that anybody knows of: the agent hears it later than it happens."""
    sighting = facts.sighting
    if sighting is None or facts.report is None or facts.state not in HAS_POINTS:
        return NO_RPO
    durable_ns = max(facts.report.durable_ns, facts.stream.durable_ns if facts.stream else 0)
    return Rpo(
        rpo_seconds(durable_ns, sighting, now_ns),
        rpo_seconds(_restorable_ns(facts), sighting, now_ns),
    )


def machine_health(facts: MachineFacts, now_ns: int, thresholds: Thresholds = THRESHOLDS) -> Health:
    """A machine that nobody wants protected is normal; one that is failed over is not missed."""
    failovers = list(failover_reasons(facts.failovers, now_ns, thresholds))
    if facts.state not in WATCHED:
        return health_of([_failed_job(facts), *failovers])
    return health_of(
        [
            *failovers,
            _silent(facts, now_ns, thresholds),
            _certificate(facts, now_ns, thresholds),
            _skew(facts, thresholds),
            _failed(facts),
            _failed_job(facts),
            _resync(facts, now_ns, thresholds),
            _progress(facts, now_ns, thresholds),
            *_lateness(facts, now_ns, thresholds),
            *_points(facts, now_ns, thresholds),
            *_store(facts),
            *_parts(facts),
            trouble_reason(Code.AGENT_TROUBLE, facts.report.troubles if facts.report else ()),
        ]
    )


def _silent(facts: MachineFacts, now_ns: int, thresholds: Thresholds) -> Reason | None:
    return silence_reason(
        Code.AGENT_SILENT,
        facts.received_ns,
        facts.since_ns,
        now_ns,
        interval_seconds=facts.interval_seconds,
        thresholds=thresholds,
    )


def _certificate(facts: MachineFacts, now_ns: int, thresholds: Thresholds) -> Reason | None:
    return certificate_reason(facts.certificate_ns, now_ns, thresholds)


def _skew(facts: MachineFacts, thresholds: Thresholds) -> Reason | None:
    return skew_reason(facts.sighting, thresholds)


def _failed(facts: MachineFacts) -> Reason | None:
    if facts.report is None or facts.report.phase is not Phase.FAILED:
        return None
    return reason(
        Code.REPLICATION_FAILED,
        Severity.CRITICAL,
        f"replication has failed: {facts.report.reason or 'the agent gives no reason'}",
    )


def _failed_job(facts: MachineFacts) -> Reason | None:
    if not facts.failed_job:
        return None
    return reason(Code.JOB_FAILED, Severity.WARNING, facts.failed_job)


def _resync(facts: MachineFacts, now_ns: int, thresholds: Thresholds) -> Reason | None:
    if facts.state is not Protection.RESYNC_REQUIRED:
        return None
    seconds = max(0.0, (now_ns - facts.since_ns) / NS)
    severity = thresholds.resync_wait_seconds.above(seconds)
    if severity is None:
        return None
    cause = facts.cause or (facts.report.cause or "" if facts.report else "")
    why = _RESYNC_CAUSES.get(ResyncCause(cause), "") if cause in set(ResyncCause) else ""
    told = facts.reason or (facts.report.reason if facts.report else "")
    return reason(
        Code.RESYNC_REQUIRED,
        severity,
        f"a resync is required ({cause or 'no cause is known'}), for {duration(seconds)} now",
        cause=": ".join(part for part in (why, told) if part),
    )


def _progress(facts: MachineFacts, now_ns: int, thresholds: Thresholds) -> Reason | None:
    if facts.progress is None:
        return None
    seconds = (now_ns - facts.progress.since_ns) / NS
    severity = thresholds.progress_seconds.above(seconds)
    if severity is None:
        return None
    what = (
        "resync"
        if facts.report and facts.report.phase is Phase.RESYNCHRONISING
        else ("initial replication")
    )
    return reason(Code.NO_PROGRESS, severity, f"{what} has not moved for {duration(seconds)}")


def _lateness(facts: MachineFacts, now_ns: int, thresholds: Thresholds) -> Iterator[Reason]:
    rpo = machine_rpo(facts, now_ns)
    wanted = facts.rpo_threshold_seconds
    if wanted <= 0:
        return
    if rpo.durable_seconds is not None:
        severity = thresholds.rpo_share.above(rpo.durable_seconds / wanted)
        if severity:
            yield reason(
                Code.RPO_EXCEEDED,
                severity,
                f"RPO durable is {duration(rpo.durable_seconds)}; "
                f"the policy allows {duration(wanted)}",
            )
    if rpo.restorable_seconds is not None:
        severity = thresholds.restorable_share.above(rpo.restorable_seconds / wanted)
        if severity:
            yield reason(
                Code.RESTORABLE_LATE,
                severity,
                f"RPO restorable is {duration(rpo.restorable_seconds)}; "
                f"the policy's threshold is {duration(wanted)}",
            )


def _points(facts: MachineFacts, now_ns: int, thresholds: Thresholds) -> Iterator[Reason]:
    if facts.state not in HAS_POINTS:
        return
    age = _age_seconds(_restorable_ns(facts), facts, now_ns)
    if age > thresholds.crash_point_seconds_max:
        yield reason(
            Code.NO_CRASH_POINT,
            Severity.CRITICAL,
            f"there is no crash-consistent point of the last {duration(age)}",
        )
    if facts.app_frequency_seconds > 0:
        newest_ns = max(
            facts.report.app_consistent_ns if facts.report else 0,
            facts.store.newest_app_ns if facts.store else 0,
        )
        wanted_ns = facts.since_ns
        if facts.app_expectation is not None:
            wanted_ns = max(wanted_ns, facts.app_expectation.since_ns)
        age = min(_age_seconds(newest_ns, facts, now_ns), max(0.0, (now_ns - wanted_ns) / NS))
        if age > facts.app_frequency_seconds + thresholds.app_margin_seconds:
            yield reason(
                Code.NO_APP_POINT,
                Severity.WARNING,
                f"there is no app-consistent point of the last {duration(age)}; "
                f"the policy wants one every {duration(facts.app_frequency_seconds)}",
            )
    report = facts.report
    if (
        report is not None
        and report.phase is Phase.REPLICATING
        and report.consistency == _NO_CONSISTENCY
    ):
        yield reason(
            Code.POINTS_INCONSISTENT,
            Severity.WARNING,
            "what is sent makes no recovery points",
            cause=report.reason,
        )


def _store(facts: MachineFacts) -> Iterator[Reason]:
    store = facts.store
    if store is None:
        return
    if store.lost:
        yield reason(
            Code.STORE_LOST, Severity.CRITICAL, f"nothing more can be applied: {store.lost}"
        )
    if store.open_repairs:
        noun = "repair is" if store.open_repairs == 1 else "repairs are"
        yield reason(
            Code.STORE_REPAIRS,
            Severity.WARNING,
            f"{store.open_repairs} {noun} open at the second site",
        )


def _parts(facts: MachineFacts) -> Iterator[Reason]:
    for code, what, part in (
        (Code.PROCESS_SERVER_UNWELL, "process server", facts.process_server),
        (Code.APPLIER_UNWELL, "applier", facts.applier),
    ):
        if part is not None and part.state is State.CRITICAL:
            yield reason(code, Severity.WARNING, f"its {what} {clean(part.name)} is critical")


def _restorable_ns(facts: MachineFacts) -> int:
    return max(
        facts.report.restorable_ns if facts.report else 0,
        facts.store.newest_ns if facts.store else 0,
    )


def _age_seconds(time_ns: int, facts: MachineFacts, now_ns: int) -> float:
    """How old a point is; where there is none, how long there should have been one."""
    if time_ns <= 0:
        return max(0.0, (now_ns - facts.since_ns) / NS)
    sighting = facts.sighting or Sighting(now_ns, now_ns)
    return rpo_seconds(time_ns, sighting, now_ns) or 0.0

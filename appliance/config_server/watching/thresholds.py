"""All limits of health in one table.

Azure Site Recovery's where it has one: CPU, memory, spool, backlog, heartbeat of a process server;
60 minutes without a crash-consistent point.

Source: docs/CONTROL.md §10.
"""

from dataclasses import dataclass

from appliance.config_server.watching.reason import Severity

_MINUTE = 60.0
_HOUR = 3600.0
_DAY = 86400.0
_GIB = float(1 << 30)


@dataclass(frozen=True, slots=True)
class Limit:
    """Beyond ``warning`` is a warning, beyond ``critical`` is critical; on the edge is well."""

    warning: float
    critical: float

    def above(self, value: float) -> Severity | None:
        if value > self.critical:
            return Severity.CRITICAL
        return Severity.WARNING if value > self.warning else None

    def below(self, value: float) -> Severity | None:
        if value < self.critical:
            return Severity.CRITICAL
        return Severity.WARNING if value < self.warning else None


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Seconds, bytes, and shares of one.

    rpo_share:             RPO durable, as a multiple of the policy's threshold.
    restorable_share:      RPO restorable, likewise.
    test_open_seconds:     how long a test's VM may be there.
    uncommitted_seconds:   how long a failover may be neither committed nor taken back.
    drill_late_seconds:    how long after its time a scheduled drill may begin.
    app_margin_seconds:    what an app-consistent point may be late.
    silent_intervals:      reports that may be missing before it is a warning.
    store_free_share:      of what is free and what the store fills together.
    """

    cpu_share: Limit = Limit(0.80, 0.95)
    memory_share: Limit = Limit(0.80, 0.95)
    spool_free_share: Limit = Limit(0.30, 0.25)
    backlog_seconds: Limit = Limit(30 * _MINUTE, 45 * _MINUTE)
    silent_intervals: int = 3
    silent_seconds_critical: float = 15 * _MINUTE
    rpo_share: Limit = Limit(1.0, 2.0)
    restorable_share: Limit = Limit(2.0, float("inf"))
    crash_point_seconds_max: float = 60 * _MINUTE
    app_margin_seconds: float = 15 * _MINUTE
    progress_seconds: Limit = Limit(15 * _MINUTE, 60 * _MINUTE)
    resync_wait_seconds: Limit = Limit(-1.0, _DAY)
    test_open_seconds: Limit = Limit(_DAY, float("inf"))
    uncommitted_seconds: Limit = Limit(_DAY, 7 * _DAY)
    drill_late_seconds: Limit = Limit(_HOUR, _DAY)
    skew_seconds: Limit = Limit(10.0, 5 * _MINUTE)
    certificate_seconds: Limit = Limit(14 * _DAY, 3 * _DAY)
    store_free_share: Limit = Limit(0.20, 0.10)
    store_free_bytes: Limit = Limit(4 * _GIB, 1 * _GIB)

    def silent(self, seconds: float, interval_seconds: float) -> Severity | None:
        """A node that has said nothing for ``seconds`` and should every ``interval_seconds``."""
        missing = self.silent_intervals * interval_seconds
        critical = max(self.silent_seconds_critical, missing)
        return Limit(missing, critical).above(seconds)


THRESHOLDS = Thresholds()

"""What the watcher remembers of a machine between two looks: when something last moved."""

from dataclasses import dataclass

from replication.control.report import MachineReport, Phase

_COPYING = (Phase.INITIAL, Phase.RESYNCHRONISING)


@dataclass(frozen=True, slots=True)
class Progress:
    """``figures`` last changed at ``since_ns``."""

    figures: tuple[object, ...]
    since_ns: int


@dataclass(frozen=True, slots=True)
class AppExpectation:
    """App-consistent points are wanted every ``frequency_seconds`` since ``since_ns``."""

    frequency_seconds: int
    since_ns: int


def follow_progress(
    before: Progress | None, report: MachineReport | None, now_ns: int
) -> Progress | None:
    """None while nothing is being copied as a whole."""
    if report is None or report.phase not in _COPYING:
        return None
    figures = (
        report.phase,
        report.generation,
        report.committed,
        report.done_bytes,
        report.total_bytes,
        report.todo_bytes,
        report.sent_bytes,
    )
    if before is not None and before.figures == figures:
        return Progress(figures, min(before.since_ns, now_ns))
    return Progress(figures, now_ns)


def follow_app_expectation(
    before: AppExpectation | None, frequency_seconds: int, protected_since_ns: int, now_ns: int
) -> AppExpectation:
    """A frequency that was changed just now cannot have been missed for hours."""
    if before is None:
        return AppExpectation(frequency_seconds, protected_since_ns)
    if before.frequency_seconds != frequency_seconds:
        return AppExpectation(frequency_seconds, now_ns)
    return before

"""What is not well with what the config server does by itself or was asked for: drills that are
scheduled, jobs that could not undo what they had begun. Pure.

Source: docs/CONTROL.md §10; docs/RECOVERY.md §6.
"""

import uuid
from dataclasses import dataclass
from enum import StrEnum

from appliance.config_server.watching.reason import (
    Code,
    Health,
    Reason,
    Severity,
    duration,
    health_of,
    reason,
)
from appliance.config_server.watching.rpo import NS
from appliance.config_server.watching.thresholds import THRESHOLDS, Thresholds


class WorkKind(StrEnum):
    """What a piece of work is."""

    DRILL_SCHEDULE = "drill-schedule"
    JOB = "job"


@dataclass(frozen=True, slots=True)
class ScheduleFacts:
    """A schedule of drills.

    target: the plan or the machine. failed: why its newest drill that has ended did not pass; empty
    when it did, or none has. due_ns: when the next one is. is_on: the last one has not ended.
    """

    id: uuid.UUID
    name: str
    target: str
    failed: str = ""
    due_ns: int = 0
    is_on: bool = False
    kind: WorkKind = WorkKind.DRILL_SCHEDULE


@dataclass(frozen=True, slots=True)
class LeftFacts:
    """A job that could not undo what it had begun.

    job: its id. name: of the machine or plan. told, action: its error, and what a person is to do.
    """

    id: uuid.UUID
    name: str
    job: str
    told: str
    action: str
    kind: WorkKind = WorkKind.JOB


WorkFacts = ScheduleFacts | LeftFacts


def work_health(facts: WorkFacts, now_ns: int, thresholds: Thresholds = THRESHOLDS) -> Health:
    """Of one piece of work."""
    if isinstance(facts, LeftFacts):
        told = f"job {facts.job}: {facts.told}"
        found = reason(Code.JOB_NOT_UNDONE, Severity.CRITICAL, told, action=facts.action)
        return health_of([found])
    return health_of([_failed(facts), _late(facts, now_ns, thresholds)])


def _failed(facts: ScheduleFacts) -> Reason | None:
    if not facts.failed:
        return None
    told = f"its newest drill of {facts.target} did not pass: {facts.failed}"
    return reason(Code.DRILL_FAILED, Severity.CRITICAL, told)


def _late(facts: ScheduleFacts, now_ns: int, thresholds: Thresholds) -> Reason | None:
    seconds = (now_ns - facts.due_ns) / NS if facts.due_ns else 0.0
    severity = thresholds.drill_late_seconds.above(seconds)
    if severity is None:
        return None
    cause = "its last drill has not ended; perhaps it waits for a person" if facts.is_on else ""
    told = f"its drill of {facts.target} is late by {duration(seconds)}"
    return reason(Code.DRILL_LATE, severity, told, cause=cause)

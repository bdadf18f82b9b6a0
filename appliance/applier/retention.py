"""Which recovery points are kept: Azure Site Recovery's thinning, as a pure function.

All ages are measured from the newest point, so that old points stay when no new ones arrive. Time
is cut into buckets aligned to 1970; a bucket is thinned when all of it is past the two hours that
keep everything (or past the 7 days of the finer grain), so a point is merged once and not each
time that a neighbour comes of age.

Source: Azure Site Recovery's common questions (retention of recovery points); docs/STORE.md §11.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from daemon.config import Section
from replication.bookmark import Consistency

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS
RETENTION_DAYS_MAX = 15
RETENTION_SECONDS_MAX = RETENTION_DAYS_MAX * DAY_SECONDS
FINE_DAYS = 7
"""Retentions above this keep one point per 2 hours for so long, then one per 4 hours."""

_NS = 1_000_000_000


class RetentionPolicy(Section):
    """How long and how densely recovery points are kept.

    retention_days:          0 keeps the latest alone; at most 15.
    retention_seconds:       the same more finely; takes the place of ``retention_days``.
    all_points_seconds:      so long every point of the crash frequency is kept.
    crash_frequency_seconds: one crash-consistent point per so much; 0 keeps every one.
    """

    retention_days: Annotated[int, Field(ge=0, le=RETENTION_DAYS_MAX)] = 1
    retention_seconds: Annotated[int, Field(ge=0, le=RETENTION_SECONDS_MAX)] | None = None
    all_points_seconds: Annotated[int, Field(ge=0)] = 2 * HOUR_SECONDS
    crash_frequency_seconds: Annotated[int, Field(ge=0)] = 300

    @property
    def window_seconds(self) -> int:
        """How old a point may become."""
        if self.retention_seconds is not None:
            return self.retention_seconds
        return self.retention_days * DAY_SECONDS


@dataclass(frozen=True, slots=True)
class Candidate:
    """A position that could be kept; ``time_ns`` is the source's clock, since 1970 UTC."""

    position: int
    time_ns: int
    consistency: Consistency


def kept(
    points: Sequence[Candidate],
    now_ns: int,
    policy: RetentionPolicy,
    held: Collection[int] = (),
) -> set[int]:
    """The positions to keep; the newest restorable one is always among them, and what is ``held``.

    Points whose time lies in the future count as new, so that a clock that once was wrong does
    not age all others. Positions without consistency are never kept.
    """
    chosen = _kept_by(points, now_ns, policy)
    return chosen | {
        point.position
        for point in points
        if point.position in held and point.consistency.restorable
    }


def _kept_by(points: Sequence[Candidate], now_ns: int, policy: RetentionPolicy) -> set[int]:
    restorable = [point for point in points if point.consistency.restorable]
    if not restorable:
        return set()
    newest = max(restorable, key=lambda point: point.position)
    if policy.window_seconds == 0:
        return {newest.position}
    latest = max(restorable, key=lambda point: point.time_ns)  # another one after a clock was set
    reference_ns = min(now_ns, latest.time_ns)
    best: dict[tuple[int, int], Candidate] = {}
    chosen = {newest.position, latest.position}
    for point in restorable:
        grain = _grain_seconds(point.time_ns, reference_ns, policy)
        if grain is None:
            continue
        if _is_young(point.time_ns, reference_ns, policy) and (
            grain == 0 or point.consistency is Consistency.APP
        ):
            chosen.add(point.position)
            continue
        bucket = (grain, point.time_ns // (grain * _NS))
        if bucket not in best or _rank(point, best[bucket]):
            best[bucket] = point
    return chosen | {point.position for point in best.values()}


def _rank(point: Candidate, other: Candidate) -> bool:
    """Whether ``point`` is the better one of its bucket: app-consistent first, then newer."""
    is_app = point.consistency is Consistency.APP
    other_is_app = other.consistency is Consistency.APP
    return (is_app, point.position) > (other_is_app, other.position)


def _thin_grain_seconds(policy: RetentionPolicy) -> int:
    return HOUR_SECONDS if policy.window_seconds <= DAY_SECONDS else 2 * HOUR_SECONDS


def _is_young(time_ns: int, reference_ns: int, policy: RetentionPolicy) -> bool:
    """Whether the point's bucket is not yet wholly past the time that keeps everything."""
    return _bucket_end_ns(time_ns, _thin_grain_seconds(policy)) > (
        reference_ns - policy.all_points_seconds * _NS
    )


def _grain_seconds(time_ns: int, reference_ns: int, policy: RetentionPolicy) -> int | None:
    """Seconds per kept point at that age; 0 for every point, None past the window."""
    if reference_ns - time_ns > policy.window_seconds * _NS:
        return None
    if _is_young(time_ns, reference_ns, policy):
        return policy.crash_frequency_seconds
    coarse = 4 * HOUR_SECONDS
    fine_until_ns = reference_ns - FINE_DAYS * DAY_SECONDS * _NS
    is_long = policy.window_seconds > FINE_DAYS * DAY_SECONDS
    if is_long and _bucket_end_ns(time_ns, coarse) <= fine_until_ns:
        return coarse
    return _thin_grain_seconds(policy)


def _bucket_end_ns(time_ns: int, grain_seconds: int) -> int:
    return (time_ns // (grain_seconds * _NS) + 1) * grain_seconds * _NS

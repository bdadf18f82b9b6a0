"""A figure: what was measured, what is aimed at, and what the plain parts reach in the same run."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AtLeast:
    """Aimed at: no less than so much."""

    value: float

    def is_met(self, measured: float, _limit: float | None) -> bool:
        return measured >= self.value

    def told(self) -> str:
        return f"≥ {shown(self.value)}"


@dataclass(frozen=True, slots=True)
class AtMost:
    """Aimed at: no more than so much."""

    value: float

    def is_met(self, measured: float, _limit: float | None) -> bool:
        return measured <= self.value

    def told(self) -> str:
        return f"≤ {shown(self.value)}"


@dataclass(frozen=True, slots=True)
class ShareOfLimit:
    """Aimed at: at least this share of the limit, 0 to 1."""

    value: float

    def is_met(self, measured: float, limit: float | None) -> bool:
        assert limit is not None
        return measured >= self.value * limit

    def told(self) -> str:
        return f"≥ {self.value:.0%} of limit"


@dataclass(frozen=True, slots=True)
class NoTarget:
    """Nothing is aimed at: to be known."""

    def is_met(self, _measured: float, _limit: float | None) -> bool:
        return True

    def told(self) -> str:
        return "none"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    figure:   what it is of.
    unit:     of measured, target and limit.
    limit:    what the plain parts reached, None where there is nothing to compare with.
    limit_is: what those parts were.
    note:     what else was seen.
    """

    figure: str
    unit: str
    target: AtLeast | AtMost | ShareOfLimit | NoTarget
    measured: float
    limit: float | None = None
    limit_is: str = ""
    note: str = ""

    @property
    def is_met(self) -> bool:
        return self.target.is_met(self.measured, self.limit)

    @property
    def ratio(self) -> float | None:
        """Measured over limit."""
        return self.measured / self.limit if self.limit else None

    def as_json(self) -> dict[str, Any]:
        return {
            "figure": self.figure,
            "unit": self.unit,
            "target": self.target.told(),
            "measured": self.measured,
            "limit": self.limit,
            "limit_is": self.limit_is,
            "ratio": self.ratio,
            "met": self.is_met,
            "note": self.note,
        }


def shown(value: float) -> str:
    """Three digits that count."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 or value == 0 else f"{value:.2g}"


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(values: Sequence[float]) -> str:
    """The median of several runs, with the least and the greatest."""
    middle = statistics.median(values)
    return f"median {shown(middle)} of {shown(min(values))} to {shown(max(values))}"

"""Which layer files follow one another, where no catalogue tells: pure.

More than one way may lead through them: a merge that was cut short leaves its result beside what it
was made of. The way that reaches furthest is right, since what it lacks is lost; of those the one
that leaves the most held positions standing; then the one with the fewest files.

Source: docs/STORE.md §10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable


@dataclass(frozen=True, slots=True, order=True)
class LayerName:
    """The positions that a layer file covers, as its name says."""

    first: int
    last: int

    @property
    def file(self) -> str:
        return f"{self.first:012d}-{self.last:012d}.layer"


@dataclass(frozen=True, slots=True, order=True)
class _Way:
    """How good the best way from a position on is; the greater the better."""

    reach: int
    held_count: int
    spared: int
    step: LayerName | None


def best_way(layers: Iterable[LayerName], position: int, held: Collection[int]) -> list[LayerName]:
    """The layers to take after ``position``, in order; empty when none follows."""
    by_first: dict[int, list[LayerName]] = {}
    for layer in layers:
        if position < layer.first <= layer.last:
            by_first.setdefault(layer.first, []).append(layer)
    ways: dict[int, _Way] = {}
    for first in sorted(by_first, reverse=True):
        found = []
        for layer in by_first[first]:
            after = ways.get(layer.last + 1, _Way(layer.last, 0, 0, None))
            found.append(
                _Way(after.reach, after.held_count + (layer.last in held), after.spared - 1, layer)
            )
        ways[first] = max(found)
    taken: list[LayerName] = []
    while (way := ways.get(position + 1)) is not None and way.step is not None:
        taken.append(way.step)
        position = way.step.last
    return taken

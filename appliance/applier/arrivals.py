"""Which of the blocks that the source was asked for have come: pure.

A manifest says which request it fulfils; whether it does is what its layers hold. Blocks may come
in several changesets. What is known is of this run of the daemon: after a restart all that is open
is asked for anew, and what a resync has brought is read from its layers.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

from replication.watermark import RepairRun


class Arrivals:
    """The blocks of each run that have not come since the run was expected."""

    def __init__(self) -> None:
        self._left: dict[RepairRun, list[tuple[int, int]]] = {}

    def expect(self, runs: Iterable[RepairRun]) -> None:
        """From now on their blocks count, also of runs that were expected before."""
        for run in runs:
            self._left[run] = [(run.block, run.block + run.count)]

    def keep(self, runs: Iterable[RepairRun]) -> None:
        """Forget all but ``runs``; what of them was never expected is expected now."""
        wanted = set(runs)
        self._left = {run: left for run, left in self._left.items() if run in wanted}
        self.expect(wanted - self._left.keys())

    @property
    def expected(self) -> frozenset[RepairRun]:
        return frozenset(self._left)

    def take(
        self,
        disk: int,
        extents: Sequence[tuple[int, int]],
        runs: Collection[RepairRun] | None = None,
    ) -> None:
        """Extents (block, count) of a disk have come; sorted, without overlaps.

        runs: those that they count for; all that are expected without it.
        """
        came = sorted(extents)
        for run, left in self._left.items():
            if run.disk == disk and left and (runs is None or run in runs):
                self._left[run] = [part for piece in left for part in _without(piece, came)]

    def have_come(self, run: RepairRun) -> bool:
        return run in self._left and not self._left[run]


def _without(piece: tuple[int, int], came: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """The parts of ``piece`` (first, end) that no extent covers."""
    at, end = piece
    first = max(0, bisect_left(came, (at, 0)) - 1)  # the one before may reach into it
    for index in range(first, len(came)):
        block, count = came[index]
        if block + count <= at:
            continue
        if block >= end:
            break
        if block > at:
            yield at, block
        at = max(at, block + count)
    if at < end:
        yield at, end

"""Apply a retention policy to a machine's store: fold what is too old, merge what is between.

Source: docs/STORE.md §11.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from appliance.applier.retention import Candidate, kept
from appliance.applier.store.merge import MERGE_LAYERS_MAX
from replication.errors import IntegrityError, UnavailableError

if TYPE_CHECKING:
    from appliance.applier.retention import RetentionPolicy
    from appliance.applier.store.catalogue import Chain
    from appliance.applier.store.machine_store import MachineStore
    from appliance.applier.store.model import LayerRow

THIN_BYTES_MAX = 2 << 30
"""One call stops after so much merging and folding, so that applying is not starved."""

OPEN_GROUP_LAYERS_MAX = MERGE_LAYERS_MAX
"""The newest point's layers stay apart until its bucket is over, unless they become so many."""


@dataclass(slots=True)
class ThinReport:
    """What one call did.

    kept:     positions that the policy keeps, or that are held.
    merged:   (first, last) of each layer made.
    folded:   positions that the base moved to.
    deferred: why something was left for the next call; empty when all is done.
    """

    kept: frozenset[int] = frozenset()
    merged: list[tuple[int, int]] = field(default_factory=list)
    folded: list[int] = field(default_factory=list)
    deferred: list[str] = field(default_factory=list)
    moved_bytes: int = 0


def thin(
    store: MachineStore, now_ns: int, policy: RetentionPolicy, *, bytes_max: int = THIN_BYTES_MAX
) -> ThinReport:
    """Bring the store nearer to what the policy keeps, at most ``bytes_max`` of work or one step.

    Held positions are kept as well. An unusable layer, a reader of an old point, or a hold that has
    just come defers its part and is told; other parts go on.
    """
    chain = store.chain()
    held = store.holds.positions(chain)
    candidates = [
        Candidate(point.position, point.bookmark.time_ns, point.bookmark.consistency)
        for point in chain.points
    ]
    report = ThinReport(kept=frozenset(kept(candidates, now_ns, policy, held)))
    _fold(store, chain, report, bytes_max)
    for rows in _groups(store.chain(), report.kept):
        if report.moved_bytes >= bytes_max:
            report.deferred.append(f"more than {bytes_max} bytes of work")
            break
        _merge(store, rows, report, bytes_max)
    return report


def _fold(store: MachineStore, chain: Chain, report: ThinReport, bytes_max: int) -> None:
    # Before the first consistent point nothing can be restored, so no layer is worth keeping.
    oldest = min(report.kept, default=chain.points[-1].position if chain.points else 0)
    for row in chain.layers:
        if row.last > oldest or report.moved_bytes >= bytes_max:
            return
        try:
            report.moved_bytes += store.fold_to(row.last)
        except (UnavailableError, IntegrityError) as error:
            report.deferred.append(str(error))
            return
        report.folded.append(row.last)


def _merge(store: MachineStore, rows: list[LayerRow], report: ThinReport, bytes_max: int) -> None:
    for at in range(0, len(rows), MERGE_LAYERS_MAX):
        part = rows[at : at + MERGE_LAYERS_MAX]
        if len(part) < 2:
            continue
        if at and report.moved_bytes >= bytes_max:
            return
        try:
            report.moved_bytes += store.merge(part[0].first, part[-1].last)
        except (UnavailableError, IntegrityError) as error:
            report.deferred.append(str(error))
            return
        report.merged.append((part[0].first, part[-1].last))


def _groups(chain: Chain, kept_positions: frozenset[int]) -> list[list[LayerRow]]:
    """Layers that become one: those up to each kept position, oldest group first."""
    groups: list[list[LayerRow]] = []
    rows: list[LayerRow] = []
    for row in chain.layers:
        rows.append(row)
        if row.last in kept_positions:
            groups.append(rows)
            rows = []
    # What follows the last kept position waits for a point that it can be restored to.
    if groups and len(groups[-1]) <= OPEN_GROUP_LAYERS_MAX:
        groups.pop()
    return [group for group in groups if len(group) > 1]

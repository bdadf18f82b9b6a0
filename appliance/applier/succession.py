"""Which changeset comes next: pure.

A changeset may be applied to the state at any bookmark of its generation from its ``since`` up to
the one before its own; the first one of a newer generation (``since`` 0) to any state. A newer
generation goes first: its stream has taken the place of the older one.

Source: FORMAT.md §6 (``since``), §9 (order).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from replication.bookmark import Stamp
from replication.watermark import WANTED_COUNT_MAX


class Unread(Enum):
    """In place of a manifest's ``since``, while that is not known."""

    UNREAD = "unread"
    """Nobody has read the manifest yet."""

    DAMAGED = "damaged"
    """It was read and cannot be used until it is put again."""


UNREAD = Unread.UNREAD
DAMAGED = Unread.DAMAGED


@dataclass(frozen=True, slots=True)
class Apply:
    """The changeset ``stamp`` can be applied now."""

    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Read:
    """The manifest of ``stamp`` must be read before it can be said what is next."""

    stamp: Stamp


@dataclass(frozen=True, slots=True)
class Gap:
    """Changesets are there, and none can be applied: these manifests are missing or damaged."""

    missing: tuple[Stamp, ...]


@dataclass(frozen=True, slots=True)
class Idle:
    """All that is there is applied."""


def follow(head: Stamp, manifests: Mapping[Stamp, int | Unread]) -> Apply | Read | Gap | Idle:
    """What to do next.

    manifests: those that a listing shows, with their ``since``; what is not after ``head`` is
               passed over.
    """
    waiting = sorted(stamp for stamp in manifests if stamp > head)
    if not waiting:
        return Idle()
    gap: Gap | None = None
    for generation in sorted({stamp.generation for stamp in waiting}, reverse=True):
        at = head.number if generation == head.generation else 0
        found = _follow(
            at,
            {stamp: manifests[stamp] for stamp in waiting if stamp.generation == generation},
        )
        if not isinstance(found, Gap):
            return found
        gap = gap or found
    assert gap is not None
    return gap


def _follow(at: int, manifests: Mapping[Stamp, int | Unread]) -> Apply | Read | Gap:
    """Within one generation, ``at`` being the number that is applied."""
    nearest: int | None = None
    damaged = []
    for stamp in sorted(manifests):
        since = manifests[stamp]
        if since is UNREAD:
            return Read(stamp)
        if since is DAMAGED:
            damaged.append(stamp)
            continue
        assert isinstance(since, int)
        if since <= at:
            return Apply(stamp)
        nearest = since if nearest is None else min(nearest, since)
    generation = next(iter(manifests)).generation
    missing = [stamp for stamp in damaged if nearest is None or stamp.number <= nearest]
    if nearest is not None:
        numbers = range(at + 1, min(nearest, at + WANTED_COUNT_MAX) + 1)
        absent = (Stamp(generation, number) for number in numbers)
        missing += [stamp for stamp in absent if stamp not in manifests]
    return Gap(tuple(sorted(missing)[:WANTED_COUNT_MAX]))

"""Positions that stay whatever the retention policy says: ``holds.json`` in the machine's folder.

A hold names one position. As long as it is written here that position is neither merged away nor
folded past, and it is written before anybody is told. With a date it is a lock: it stays until
then, and the machine's points are not removed before.

Source: docs/RECOVERY.md §2; docs/STORE.md §13.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import xxhash

from daemon.durable import storage_error, sync_folder, write_whole
from replication.bookmark import Stamp
from replication.errors import IntegrityError, LimitError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from appliance.applier.store.catalogue import Chain
    from appliance.applier.store.model import Point

NAME = "holds.json"
HELD_MAX = 4096
"""Holds of one machine, locks that nobody names any more included."""


@dataclass(frozen=True, slots=True)
class HeldPosition:
    """A position that stays.

    stamp, attempt: of the position: a store that was put back has another one there, perhaps.
    until_ns:       it stays at least so long (a lock); 0: for as long as it is wanted.
    held_ns:        since when it is held, nanoseconds since 1970 UTC.
    """

    id: uuid.UUID
    position: int
    stamp: Stamp
    attempt: bytes
    until_ns: int
    held_ns: int

    def is_locked(self, now_ns: int) -> bool:
        return self.until_ns > now_ns

    def holds(self, point: Point) -> bool:
        """Whether it is this position of this store that is held."""
        return (self.position, self.stamp, self.attempt) == (
            point.position,
            point.bookmark.stamp,
            point.attempt,
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """What people see of a point's holds.

    held:            something is made from it.
    locked_until_ns: it cannot be deleted before; 0: no lock.
    """

    held: bool = False
    locked_until_ns: int = 0


def marks_of(
    points: Iterable[Point], holds: Iterable[HeldPosition], now_ns: int
) -> dict[int, Mark]:
    """The marks of those points that are held, by position."""
    by_position: dict[int, list[HeldPosition]] = {}
    for held in holds:
        by_position.setdefault(held.position, []).append(held)
    marks = {}
    for point in points:
        found = [held for held in by_position.get(point.position, ()) if held.holds(point)]
        if found:
            locks = [held.until_ns for held in found if held.is_locked(now_ns)]
            marks[point.position] = Mark(len(locks) < len(found), max(locks, default=0))
    return marks


class HoldBook:
    """The holds of a machine's open store; every change is on stable storage when it returns."""

    def __init__(self, folder: str) -> None:
        """Raise IntegrityError when the file is not what was written."""
        self._folder = folder
        self._holds = read_durable_holds(folder)
        self._deciding = threading.RLock()

    @property
    def holds(self) -> tuple[HeldPosition, ...]:
        return self._holds

    def deciding(self) -> threading.RLock:
        """Held by whoever chooses a position to hold, and by whoever makes one unreachable, from
        the look at what there is until it is written down. Never for long.
        """
        return self._deciding

    def replace(self, holds: Iterable[HeldPosition]) -> None:
        """These from now on. Raises StorageError, LimitError; it is as before then."""
        wanted = tuple(holds)
        if wanted == self._holds:
            return
        if len(wanted) > HELD_MAX:
            raise LimitError(
                f"{self._folder} would have {len(wanted)} holds, {HELD_MAX} are allowed",
                hint="locks that are over make room",
            )
        with self._deciding:
            _write(self._folder, wanted)
            self._holds = wanted

    def positions(self, chain: Chain) -> frozenset[int]:
        """Positions of ``chain`` that are held."""
        return held_positions(self._holds, chain)

    def check_free(self, look: Callable[[], Chain], first: int, last: int) -> None:
        """Raise UnavailableError when a position from ``first`` to the one before ``last`` is held.

        ``look``: asked for the chain where that matters. Under ``deciding`` it remains true.
        """
        if not self._holds:
            return
        chain = look()
        held = [at for at in self.positions(chain) if first <= at < last]
        if held:
            raise UnavailableError(
                f"position {min(held)} of machine {chain.machine} is held",
                hint="its layers stay until whoever holds it lets go",
            )


def held_positions(holds: Sequence[HeldPosition], chain: Chain) -> frozenset[int]:
    """Positions of ``chain`` that are held: those that are still what they were."""
    by_position = {point.position: point for point in chain.points} if holds else {}
    return frozenset(
        held.position
        for held in holds
        if (point := by_position.get(held.position)) is not None and held.holds(point)
    )


def read_holds(folder: str) -> tuple[HeldPosition, ...]:
    """What ``holds.json`` of a machine's folder says; nothing where there is none.

    Raises IntegrityError for a file that is not what was written, StorageError.
    """
    path = os.path.join(folder, NAME)
    try:
        with open(path, "rb") as file:
            digest, _, body = file.read().partition(b"\n")
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise storage_error("read", path, error) from error
    hint = (
        "nothing is thinned or removed meanwhile; move it away if it is lost: what is still "
        "wanted is held again, locks that nobody asks for any more are gone with it"
    )
    if xxhash.xxh3_128_hexdigest(body).encode() != digest:
        told = f"{path} does not have the digest that its first line declares"
        raise IntegrityError(told, hint=hint)
    try:
        return tuple(_from_json(tree) for tree in json.loads(body)["holds"])
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"{path} is not as specified: {error}", hint=hint) from error


def read_durable_holds(folder: str) -> tuple[HeldPosition, ...]:
    """As `read_holds`, and what is read is on stable storage: who wrote it may have been killed
    before it was.
    """
    if os.path.isdir(folder):
        try:
            sync_folder(folder)
        except OSError as error:
            raise storage_error("sync", folder, error) from error
    return read_holds(folder)


def _write(folder: str, holds: Sequence[HeldPosition]) -> None:
    tree = {"holds": [_to_json(held) for held in holds]}
    body = json.dumps(tree, sort_keys=True).encode() + b"\n"
    digest = xxhash.xxh3_128_hexdigest(body).encode() + b"\n"
    write_whole(os.path.join(folder, NAME), digest + body)


def _to_json(held: HeldPosition) -> dict[str, Any]:
    return {
        "id": str(held.id),
        "position": held.position,
        "generation": held.stamp.generation,
        "number": held.stamp.number,
        "attempt": held.attempt.hex(),
        "until_ns": held.until_ns,
        "held_ns": held.held_ns,
    }


def _from_json(tree: dict[str, Any]) -> HeldPosition:
    return HeldPosition(
        id=uuid.UUID(tree["id"]),
        position=int(tree["position"]),
        stamp=Stamp(int(tree["generation"]), int(tree["number"])),
        attempt=bytes.fromhex(tree["attempt"]),
        until_ns=int(tree["until_ns"]),
        held_ns=int(tree["held_ns"]),
    )

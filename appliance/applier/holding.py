"""What becomes of the holds of a machine: which point each one takes, and how long it stays.

`choose` and `remaining` decide and are pure; a `Holder` carries it out on an open store. A choice
is looked at and the position written down with nothing in between that could take the position
away; what is said of a hold is said after that.

Source: docs/RECOVERY.md §2.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from appliance.applier.store.catalogue import Chain
from appliance.applier.store.holds import HeldPosition
from appliance.applier.store.machine_store import MachineStore
from appliance.applier.store.model import Point
from appliance.applier.store.point_names import point_name
from appliance.applier.store.reader_store import recovery_points
from replication.bookmark import NOTHING, Consistency, Stamp
from replication.control.recovery import Hold, PointChoice
from replication.errors import LimitError, StorageError

if TYPE_CHECKING:
    import uuid


@dataclass(frozen=True, slots=True)
class Wish:
    """The holds of one machine as an assignment names them.

    may_end: those that it does not name are over. False where the assignment may have forgotten
             some, because it is of an older memory.
    """

    holds: tuple[Hold, ...] = ()
    may_end: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a hold. ``point``: the one that is held."""

    state: Literal["waiting", "held", "refused"]
    reason: str = ""
    point: Point | None = None

    @classmethod
    def waits(cls, reason: str) -> "Answer":
        return cls("waiting", reason)

    @classmethod
    def refuses(cls, reason: str) -> "Answer":
        return cls("refused", reason)


def choose(hold: Hold, chain: Chain) -> Answer:
    """The point that a hold takes of what there is now, or why there is none."""
    points = recovery_points(chain)
    if hold.choice == PointChoice.LATEST:
        return _latest(Stamp(hold.generation, hold.number), chain, points)
    if hold.choice not in tuple(PointChoice):
        return _named(hold.choice, chain, points)
    if not points:
        return Answer.refuses(_no_point(chain))
    if hold.choice == PointChoice.LATEST_PROCESSED:
        return Answer("held", point=points[-1])
    app = [point for point in points if point.bookmark.consistency is Consistency.APP]
    if not app:
        return Answer.refuses(
            f"none of the {len(points)} recovery points is app-consistent: "
            f"they are {point_name(points[0])} to {point_name(points[-1])}"
        )
    return Answer("held", point=app[-1])


def _latest(awaited: Stamp, chain: Chain, points: Sequence[Point]) -> Answer:
    if points and points[-1].bookmark.stamp >= awaited:
        return Answer("held", point=points[-1])
    if awaited == NOTHING:
        return Answer.refuses(_no_point(chain))
    head = chain.points[-1].bookmark.stamp if chain.points else NOTHING
    applied = f"changeset {head} is applied" if head > NOTHING else "nothing is applied yet"
    if head < awaited:
        return Answer.waits(f"{applied}, {awaited} or newer is awaited")
    return Answer.waits(
        f"{applied}, and no point from {awaited} on is consistent: the next one is awaited"
    )


def _named(name: str, chain: Chain, points: Sequence[Point]) -> Answer:
    found = next((point for point in chain.points if point_name(point) == name), None)
    if found in points:
        return Answer("held", point=found)
    if found is None and points:
        there = f"its recovery points are {point_name(points[0])} to {point_name(points[-1])}"
        return Answer.refuses(f"there is no point {name}: {there}")
    if found is None:
        return Answer.refuses(f"there is no point {name}: {_no_point(chain)}")
    if found.bookmark.consistency.restorable:
        return Answer.waits(f"point {name} was being thinned when it was asked for")
    why = f" ({found.bookmark.reason})" if found.bookmark.reason else ""
    return Answer.refuses(f"{name} is not consistent and cannot be restored{why}")


def _no_point(chain: Chain) -> str:
    if not chain.points:
        return "the machine has no recovery point: nothing of it is applied yet"
    head = chain.points[-1].bookmark.stamp
    return f"the machine has no recovery point: up to {head} nothing that is applied is consistent"


def remaining(kept: Iterable[HeldPosition], wish: Wish, now_ns: int) -> tuple[HeldPosition, ...]:
    """Which holds go on, those that are named with a later date for longer.

    A lock stays until its time, also when it is named no more, or with an earlier time.
    """
    named = {hold.id: hold for hold in wish.holds}
    left = []
    for held in kept:
        hold = named.get(held.id)
        if hold is not None:
            left.append(replace(held, until_ns=max(held.until_ns, hold.until_ns)))
        elif not wish.may_end or held.is_locked(now_ns):
            left.append(held)
    return tuple(left)


def answer_of(held: HeldPosition, chain: Chain) -> Answer:
    """What a hold that is written down is worth now."""
    point = chain.point(held.position)
    if point is not None and held.holds(point):
        return Answer("held", point=point)
    return Answer.refuses(
        f"position {held.position} of changeset {held.stamp}, which it held, is not in the store: "
        "the store was put back or begun anew"
    )


class Holder:
    """Carries out the holds of one machine while its store is open.

    answers: what became of each that is named; on stable storage where it is ``held``.
    """

    def __init__(self, store: MachineStore) -> None:
        self._store = store
        self._wish: Wish | None = None
        self.answers: Mapping[uuid.UUID, Answer] = {}

    def is_settled(self, wish: Wish) -> bool:
        """Whether there is nothing to do: all that is wished for is held, and nothing else."""
        return (
            self._wish is wish
            and all(answer.state == "held" for answer in self.answers.values())
            and all(held.id in self.answers for held in self._store.holds.holds)
        )

    def tend(self, wish: Wish, now_ns: int) -> bool:
        """Begin, lengthen and end what is wished for; whether an answer is another one now.

        A hold that cannot be written down waits, and the others stay as they were.
        """
        book = self._store.holds
        self._wish = wish
        with book.deciding():
            chain = self._store.chain()
            kept = remaining(book.holds, wish, now_ns)
            by_id = {held.id: held for held in kept}
            answers: dict[uuid.UUID, Answer] = {}
            new: list[HeldPosition] = []
            for hold in wish.holds:
                held = by_id.get(hold.id)
                answer = choose(hold, chain) if held is None else answer_of(held, chain)
                answers[hold.id] = answer
                if held is None and answer.point is not None:
                    new.append(_begin(hold, answer.point, now_ns))
            try:
                book.replace((*kept, *new))
            except (StorageError, LimitError) as error:
                told = Answer.waits(f"it cannot be written down: {error}")
                answers |= {held.id: told for held in new}
                self._wish = None  # also one that was only to last longer is tried again
        before, self.answers = self.answers, answers
        return {id_: one.state for id_, one in before.items()} != {
            id_: one.state for id_, one in answers.items()
        }


def _begin(hold: Hold, point: Point, now_ns: int) -> HeldPosition:
    return HeldPosition(
        id=hold.id,
        position=point.position,
        stamp=point.bookmark.stamp,
        attempt=point.attempt,
        until_ns=hold.until_ns,
        held_ns=now_ns,
    )

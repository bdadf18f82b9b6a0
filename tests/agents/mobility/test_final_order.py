"""Which order is due, and what is told of it, over restarts."""

from pathlib import Path

import pytest

from agents.mobility.final_order import (
    ENDED,
    FINAL_FILE,
    NOTHING_TOLD,
    REASON_CHARS_MAX,
    FinalBook,
    FinalOrder,
    FinalTold,
)
from replication.bookmark import Stamp


class Proof:
    def __init__(self) -> None:
        self.broken = ""

    def why_broken(self) -> str:
        return self.broken


class Desk:
    """A book that can be opened again, as by an agent that starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.changes = folder, 0
        self.book = self.opened()

    def opened(self) -> FinalBook:
        self.book = FinalBook(str(self.folder), self._changed)
        return self.book

    def is_due(self) -> bool:
        return self.book.is_due

    def _changed(self) -> None:
        self.changes += 1


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


def test_order_is_due_until_it_is_begun(desk: Desk) -> None:
    assert (desk.book.wanted, desk.is_due()) == (None, False)
    desk.book.want(5, 30)
    assert (desk.book.wanted, desk.is_due()) == (FinalOrder(5, 30), True)
    assert desk.opened().wanted is None
    desk.book.want(5, 30)
    assert desk.is_due(), "nothing was frozen for it before the restart"
    desk.book.begin(5)
    assert not desk.is_due()
    assert desk.book.told() == NOTHING_TOLD
    desk.book.want(6, 30)
    assert desk.is_due()


def test_order_that_holds_is_told_for_as_long_as_it_does(desk: Desk) -> None:
    proof = Proof()
    desk.book.want(5, 30)
    desk.book.begin(5)
    desk.book.hold(Stamp(2, 9), proof)
    assert desk.changes == 1
    assert desk.book.told() == FinalTold(5, 2, 9)
    desk.book.repeat()
    assert desk.changes == 2
    proof.broken = "somebody wrote"
    assert desk.book.told() == FinalTold(reason="somebody wrote")
    desk.book.fail(5, "somebody wrote " * 100)
    assert desk.changes == 3
    assert desk.book.told().reason == ("somebody wrote " * 100)[:REASON_CHARS_MAX]
    assert not desk.is_due()
    desk.opened().want(5, 30)
    assert desk.book.told().reason == ("somebody wrote " * 100)[:REASON_CHARS_MAX]


def test_order_is_not_begun_again_by_the_next_agent(desk: Desk) -> None:
    desk.book.want(5, 30)
    desk.book.begin(5)
    desk.book.hold(Stamp(2, 9), Proof())
    desk.opened().want(5, 30)
    assert not desk.is_due()
    assert desk.book.told() == FinalTold(reason=ENDED)


def test_order_that_is_taken_back_leaves_nothing(desk: Desk) -> None:
    desk.book.want(5, 30)
    desk.book.begin(5)
    desk.book.hold(Stamp(2, 9), Proof())
    desk.book.want(0, 30)
    assert desk.book.told() == NOTHING_TOLD
    assert not (desk.folder / FINAL_FILE).exists()
    desk.book.want(5, 30)
    assert desk.is_due()
    desk.book.clear()
    desk.book.clear()


def test_what_held_is_revoked_once(desk: Desk) -> None:
    desk.book.revoke("back")
    assert desk.changes == 0
    desk.book.want(5, 30)
    desk.book.begin(5)
    desk.book.hold(Stamp(2, 9), Proof())
    desk.book.revoke("back")
    assert desk.book.told() == FinalTold(reason="back")


@pytest.mark.parametrize("left", [b"", b"{}", b"[1]", b'{"order": "x", "reason": 1}', b"\xff"])
def test_damaged_file_is_no_order(desk: Desk, left: bytes) -> None:
    (desk.folder / FINAL_FILE).write_bytes(left)
    desk.opened().want(5, 30)
    assert desk.is_due()

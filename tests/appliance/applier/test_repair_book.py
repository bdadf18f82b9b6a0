from pathlib import Path

import pytest

from appliance.applier.repair_book import REPAIR_FILE, RepairBook
from replication.bookmark import DiskShape
from replication.errors import IntegrityError
from replication.watermark import REPAIR_RUNS_MAX, Repair, RepairRun


def run(block: int, count: int = 1, disk: int = 0) -> RepairRun:
    return RepairRun(disk, block, count)


def test_requests_count_up_and_keep_what_is_open(tmp_path: Path) -> None:
    book = RepairBook(str(tmp_path))
    assert book.repair == Repair()
    assert book.ask([run(5), run(6), run(9)]) == (run(5, 2), run(9))
    assert book.ask([run(6)]) == ()
    book.ask([run(40)])
    assert book.repair == Repair(2, (run(5, 2), run(9), run(40)))
    assert RepairBook(str(tmp_path)).repair == book.repair
    assert book.fulfilled(1) == (run(5, 2), run(9))
    book.ask((), closing=book.fulfilled(1))
    assert book.repair == Repair(2, (run(40),))


def test_runs_are_closed_and_asked_for_again_in_one_step(tmp_path: Path) -> None:
    book = RepairBook(str(tmp_path))
    book.ask([run(0, 16)])
    assert book.ask([run(3)], closing=[run(0, 16)]) == (run(3),)
    assert book.repair == Repair(2, (run(3),))


def test_restart_asks_anew(tmp_path: Path) -> None:
    RepairBook(str(tmp_path)).ask([run(1)])
    book = RepairBook(str(tmp_path))
    book.ask_again()
    assert book.repair == Repair(2, (run(1),))
    assert book.fulfilled(1) == ()


def test_runs_outside_the_disks_are_dropped(tmp_path: Path) -> None:
    book = RepairBook(str(tmp_path))
    book.ask([run(1), run(9), run(1, disk=1)])
    book.fit([DiskShape(0, "a", 5 * 4096)])
    assert book.open_runs == (run(1),)


def test_too_many_runs_are_lost(tmp_path: Path) -> None:
    book = RepairBook(str(tmp_path))
    book.ask([run(2 * at) for at in range(REPAIR_RUNS_MAX)])
    assert (book.lost, len(book.repair.runs)) == ("", REPAIR_RUNS_MAX)
    book.ask([run(100_001)])
    assert "need repair" in book.lost
    assert book.repair.runs == ()
    assert book.ask([run(200_001)]) == ()


def test_file_that_is_no_book_is_refused(tmp_path: Path) -> None:
    (tmp_path / REPAIR_FILE).write_text('{"request": 1}')
    with pytest.raises(IntegrityError, match="move it away"):
        RepairBook(str(tmp_path))

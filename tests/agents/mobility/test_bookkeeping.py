"""The steps between the agent's memory and what the process server tells."""

import os
import uuid
from pathlib import Path

import pytest

from agents.mobility.bookkeeping import (
    begin_generation,
    begin_resync,
    end_comparison,
    finish,
    learn_applied,
    make_pending,
    note_compared,
    reopen,
    require_resync,
    settle,
    take_up_repair,
)
from agents.mobility.device import DeviceIdentity
from agents.mobility.resync_stage import Stage
from agents.mobility.stream_state import Pending, StreamStateFile
from replication.block_set import BlockSet
from replication.bookmark import NOTHING, Stamp
from replication.control.report import ResyncCause
from replication.manifest import NO_BASIS
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Repair, RepairRun, Watermark

MACHINE = uuid.UUID(int=6)
COUNT = 128
IDENTITY = DeviceIdentity("boot", "7:1", 4, COUNT * 4096, "")
ATTEMPT = b"p" * 16


def told(
    server: Stamp = NOTHING, applied: Stamp = NOTHING, repair: Repair | None = None
) -> StreamState:
    watermark = Watermark(MACHINE, applied=applied, repair=repair or Repair())
    return StreamState(server, ATTEMPT, 0, 0, watermark)


def settled(state: StreamStateFile, stream: StreamState) -> None:
    settle(state, stream, {0: COUNT}, {0: IDENTITY})


def resync_begun(state: StreamStateFile, stream: StreamState, count: int = COUNT) -> None:
    require_resync(state, ResyncCause.UNCLEAN_SHUTDOWN, "the machine was started anew")
    begin_resync(state, stream, {0: count}, {0: IDENTITY})


def closes(state: StreamStateFile) -> None:
    """Send what begins a resync, and have it taken."""
    number = state.position.committed + 1
    stamp = Stamp(state.position.generation, number)
    make_pending(state, Pending(stamp, ATTEMPT, whole=False), {}, audit_chunk=0)
    finish(state)


@pytest.fixture
def state(tmp_path: Path) -> StreamStateFile:
    made = StreamStateFile(str(tmp_path), MACHINE)
    settled(made, told())
    return made


def changed(state: StreamStateFile, *numbers: int) -> None:
    for number in numbers:
        state.todo[0].add_run(number, 1)


def sends(state: StreamStateFile, *, whole: bool = True, taken: bool = True) -> None:
    """All that is to do, in a changeset of its own."""
    number = state.position.committed + 1
    sent = {0: state.todo[0].copy()}
    stamp = Stamp(state.position.generation, number)
    make_pending(state, Pending(stamp, ATTEMPT, whole), sent, audit_chunk=number)
    if taken:
        finish(state)


def numbers(blocks: BlockSet) -> set[int]:
    return {at for first, count in blocks.runs() for at in range(first, first + count)}


def test_number_whose_commit_may_have_been_sent_is_not_used_again(
    state: StreamStateFile, tmp_path: Path
) -> None:
    sends(state)
    changed(state, 3)
    sends(state, taken=False)
    given_up = state.position.next_stamp.number - 1
    settled(state, told(Stamp(1, 1)))
    again = StreamStateFile(str(tmp_path), MACHINE)
    assert again.position.pending is None
    assert again.position.next_stamp == Stamp(1, given_up + 1)
    assert (again.position.since, numbers(again.todo[0])) == (1, {3})


def test_first_generation_has_everything_to_do(state: StreamStateFile) -> None:
    assert state.position.generation == 1
    assert not state.position.seeded
    assert len(state.todo[0]) == COUNT
    assert state.position.identities == {0: IDENTITY}


def test_generation_is_above_all_that_anyone_has_seen(state: StreamStateFile) -> None:
    begin_generation(state, told(Stamp(7, 3), Stamp(9, 1)), {0: COUNT}, {0: IDENTITY})
    assert state.position.generation == 10


def test_a_required_resync_sends_nothing_until_it_begins(state: StreamStateFile) -> None:
    sends(state)
    changed(state, 3)
    sends(state, taken=False)
    require_resync(state, ResyncCause.TRACKING_LOST, "tracking was lost")
    assert state.position.pending is None
    for told_now in (told(Stamp(1, 1)), told(Stamp(1, 2)), told(Stamp(7, 7))):
        settled(state, told_now)
        assert state.position.stage is Stage.REQUIRED
        assert state.position.generation == 1


def test_resync_lets_go_of_old_sets_and_keeps_what_is_known_to_have_changed(
    state: StreamStateFile,
) -> None:
    sends(state)
    changed(state, 3)
    sends(state, taken=False)
    resync_begun(state, told(Stamp(1, 1)))
    position = state.position
    assert (position.generation, position.committed, position.since) == (2, 0, 0)
    assert position.stage is Stage.COMPARING
    assert not position.seeded
    assert numbers(state.todo[0]) == {3}
    assert os.listdir(f"{state.folder}/retained") == []


@pytest.mark.parametrize("count", [COUNT // 2, COUNT * 2])
def test_resync_of_a_disk_that_changed_its_size(state: StreamStateFile, count: int) -> None:
    sends(state)
    changed(state, 3, COUNT - 1)
    resync_begun(state, told(Stamp(1, 1)), count)
    assert state.todo[0].block_count == count
    assert numbers(state.todo[0]) == ({3} if count < COUNT else {3, COUNT - 1})


def test_resync_is_remembered_across_a_crash_at_each_step(state: StreamStateFile) -> None:
    def again() -> StreamStateFile:
        return StreamStateFile(os.path.dirname(state.folder), MACHINE)

    sends(state)
    require_resync(state, ResyncCause.DISK_RESIZED, "it grew", ordered=True, request=4)
    assert again().position == state.position
    begin_resync(state, told(Stamp(1, 1)), {0: COUNT}, {0: IDENTITY})
    assert again().position == state.position
    closes(state)
    found = BlockSet(COUNT)
    found.add_run(32, 16)
    note_compared(state, b"b" * 16, {0: found}, 1 << 20)
    assert again().position == state.position
    assert numbers(again().todo[0]) == set(range(32, 48))
    end_comparison(state)
    assert again().position == state.position
    assert state.position.applied == Stamp(2, 1)
    assert state.position.resync_request == 4
    sends(state)
    assert again().position.resync is None
    assert again().position.basis == b"b" * 16


def test_what_closed_the_old_generation_and_was_lost_is_sent_once_more(
    state: StreamStateFile,
) -> None:
    sends(state)
    resync_begun(state, told(Stamp(1, 1)))
    closes(state)
    settled(state, told(Stamp(1, 1)))
    assert (state.position.since, state.position.committed) == (0, 1)
    assert state.position.stage is Stage.COMPARING
    closes(state)
    assert (state.position.since, state.position.committed) == (2, 2)


def test_after_a_comparison_nothing_can_count_from_before_it(state: StreamStateFile) -> None:
    sends(state)
    resync_begun(state, told(Stamp(1, 1)))
    closes(state)
    note_compared(state, b"b" * 16, {}, 0)
    end_comparison(state)
    changed(state, 7)
    sends(state)
    settled(state, told())  # everything upstream is lost, the store is not
    assert state.position.since == 1
    assert numbers(state.todo[0]) == {7}


def test_store_that_went_back_is_compared_from_the_beginning(state: StreamStateFile) -> None:
    sends(state)
    resync_begun(state, told(Stamp(1, 1)))
    closes(state)
    note_compared(state, b"b" * 16, {}, 5 << 20)
    reopen(state)
    assert state.position.since == 0
    assert state.position.basis == NO_BASIS
    assert state.position.resync is not None
    assert state.position.resync.cursor == 0


def test_first_cause_is_told_and_an_order_stays_good(state: StreamStateFile) -> None:
    require_resync(state, ResyncCause.DISK_RESIZED, "it grew")
    require_resync(state, ResyncCause.OPERATOR, "ordered", ordered=True, request=2)
    resync = state.position.resync
    assert resync is not None
    assert (resync.cause, resync.ordered) == (ResyncCause.DISK_RESIZED, True)
    begin_resync(state, told(), {0: COUNT}, {0: IDENTITY})
    require_resync(state, ResyncCause.UNCLEAN_SHUTDOWN, "the machine was started anew")
    later = state.position.resync
    assert later is not None
    assert (later.cause, later.ordered) == (ResyncCause.UNCLEAN_SHUTDOWN, True)
    assert state.position.resync_request == 2


def test_disks_that_come_while_comparing_begin_it_anew(state: StreamStateFile) -> None:
    sends(state)
    resync_begun(state, told(Stamp(1, 1)))
    closes(state)
    settle(state, told(Stamp(2, 1)), {0: COUNT, 1: COUNT}, {0: IDENTITY, 1: IDENTITY})
    assert state.position.stage is Stage.REQUIRED
    assert state.position.resync is not None
    assert state.position.resync.cause is ResyncCause.DISKS_CHANGED


def test_lost_changesets_are_to_do_again_and_count_from_what_is_known(
    state: StreamStateFile,
) -> None:
    sends(state)
    for block in (10, 20, 30):
        changed(state, block)
        sends(state)
    changed(state, 40)
    settled(state, told(Stamp(1, 2)))
    assert numbers(state.todo[0]) == {20, 30, 40}
    assert (state.position.since, state.position.committed) == (2, 4)
    assert sorted(state.retained()) == [1, 2]
    sends(state)
    assert state.retained()[5] == 2
    # That one is lost as well: it alone has all of it.
    settled(state, told(Stamp(1, 2)))
    assert numbers(state.todo[0]) == {20, 30, 40}


@pytest.mark.parametrize("answer", ["lost", "taken", "applied"])
def test_pending_commit_after_a_crash(state: StreamStateFile, answer: str) -> None:
    sends(state)
    changed(state, 10)
    sends(state, taken=False)
    state = StreamStateFile(os.path.dirname(state.folder), MACHINE)
    if answer == "lost":
        settled(state, told(Stamp(1, 1)))
        assert numbers(state.todo[0]) == {10}
        assert state.position.committed == 1
        assert sorted(state.retained()) == [1]
    else:
        stream = told(Stamp(1, 2))
        if answer == "applied":  # and then forgotten by the process server
            watermark = Watermark(MACHINE, applied=Stamp(1, 2), attempt=ATTEMPT)
            stream = StreamState(Stamp(1, 1), ATTEMPT, 0, 0, watermark)
        settled(state, stream)
        assert not state.todo[0]
        assert state.position.committed == 2
    assert state.position.pending is None


def test_part_of_a_backlog_leaves_the_rest_to_do(state: StreamStateFile) -> None:
    part = {0: state.todo[0].first(50)}
    make_pending(state, Pending(Stamp(1, 1), ATTEMPT, whole=False), part, audit_chunk=0)
    finish(state)
    assert not state.position.seeded
    assert numbers(state.todo[0]) == set(range(50, COUNT))
    settled(state, told())  # it is lost: both parts are to do, from the beginning
    assert len(state.todo[0]) == COUNT
    assert state.position.since == 0


def test_sets_go_when_their_changesets_are_applied(state: StreamStateFile) -> None:
    for _ in range(3):
        changed(state, 5)
        sends(state)
    assert learn_applied(state, Stamp(9, 9)) == 3
    assert learn_applied(state, Stamp(1, 2)) == 1
    assert state.position.applied == Stamp(1, 2)
    assert learn_applied(state, Stamp(1, 1)) == 1  # an old answer
    assert state.position.applied == Stamp(1, 2)
    settled(state, told())  # a process server that lost all: no more than that is known applied
    assert numbers(state.todo[0]) == {5}
    assert state.position.since == 2


def test_a_pending_changeset_that_is_applied_already_keeps_its_blocks(
    state: StreamStateFile,
) -> None:
    changed(state, 5)
    sent = {0: state.todo[0].copy()}
    make_pending(state, Pending(Stamp(1, 1), ATTEMPT, whole=True), sent, audit_chunk=0)
    applied = told(Stamp(1, 1), Stamp(1, 1))  # killed before the answer, and everybody else quick
    assert learn_applied(state, applied.watermark.applied) == 1
    settled(state, applied)
    assert state.position.pending is None
    assert not state.todo[0]
    assert learn_applied(state, applied.watermark.applied) == 0


def test_repair_is_taken_up_once_and_within_the_disk(state: StreamStateFile) -> None:
    sends(state)
    runs = (RepairRun(0, 5, 2), RepairRun(0, 126, 10), RepairRun(0, 500, 1), RepairRun(9, 0, 1))
    assert take_up_repair(state, Repair(3, runs))
    assert numbers(state.todo[0]) == {5, 6, 126, 127}
    assert not take_up_repair(state, Repair(3, runs))
    make_pending(
        state, Pending(Stamp(1, 2), ATTEMPT, whole=False), {0: BlockSet(COUNT)}, audit_chunk=0
    )
    finish(state)
    assert (state.position.repaired, state.position.repairing) == (0, 3)
    sends(state)
    assert (state.position.repaired, state.position.repairing) == (3, 3)


def test_resync_leaves_repairs_open(state: StreamStateFile) -> None:
    sends(state)
    asked = Repair(4, (RepairRun(0, 1, 1),))
    resync_begun(state, told(Stamp(1, 1), repair=asked))
    closes(state)
    note_compared(state, b"b" * 16, {}, 0)
    end_comparison(state)
    assert take_up_repair(state, asked)
    sends(state)
    assert (state.position.repaired, state.position.repairing) == (4, 4)


def test_attempt_is_unknown_after_the_process_server_forgot_it(state: StreamStateFile) -> None:
    sends(state)
    settled(state, StreamState(Stamp(1, 1), NO_ATTEMPT, 0, 0, Watermark(MACHINE)))
    assert state.position.generation == 1

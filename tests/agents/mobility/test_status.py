"""What the agent tells of itself."""

import json
import os
import uuid
from pathlib import Path

import pytest

from agents.mobility.status import RECORDS_MAX, AgentStatus, ChangesetRecord
from agents.mobility.stream_state import StreamStateFile
from replication.block_set import BLOCK_BYTES, BlockSet
from replication.bookmark import Stamp
from replication.control.report import Phase, ResyncCause
from replication.errors import StorageError
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Watermark

MACHINE = uuid.UUID(int=2)


def status_in(folder: Path) -> AgentStatus:
    return AgentStatus(str(folder / "status.json"), str(MACHINE), "db", "ebpf", [])


def test_news_are_a_whole_file_each_time(tmp_path: Path) -> None:
    status = status_in(tmp_path)
    state = StreamStateFile(str(tmp_path), MACHINE)
    state.save(generation=1, committed=3, seeded=True)
    status.learn(StreamState(Stamp(1, 3), NO_ATTEMPT, 7, 0, Watermark(MACHINE)), state)
    status.begin(Stamp(1, 4), 4096)
    for number in range(RECORDS_MAX + 5):
        record = ChangesetRecord(f"1.{number}", number, "crash", "", 8192, 100, 0.01, 0.2, 0)
        status.committed_changeset(record)
    told = json.loads((tmp_path / "status.json").read_text())
    assert (told["state"], told["committed"], told["durable_ns"]) == ("replicating", "1.3", 7)
    assert len(told["records"]) == RECORDS_MAX
    assert told["records"][-1]["changeset"] == f"1.{RECORDS_MAX + 4}"
    assert (told["changed_bytes"], told["under_way"]) == (8192 * (RECORDS_MAX + 5), "")
    assert told["pid"] == os.getpid()
    assert (status.pauses, round(status.pause_seconds, 2)) == (RECORDS_MAX + 5, 1.05)
    assert (status.consistency, status.app_consistent_ns) == ("crash", 0)
    assert not (tmp_path / "status.json.new").exists()


def test_changes_of_the_phase_are_told_once_each(tmp_path: Path) -> None:
    status = status_in(tmp_path)
    told: list[Phase] = []
    status.on_phase = lambda: told.append(status.phase)
    status.enter(Phase.INITIAL)
    status.enter(Phase.INITIAL)
    status.enter(Phase.RESYNC_REQUIRED, cause=ResyncCause.DISK_RESIZED, reason="it grew")
    status.enter(Phase.RESYNC_REQUIRED, cause=ResyncCause.INTEGRITY, reason="it rots")
    assert told == [Phase.INITIAL, Phase.RESYNC_REQUIRED, Phase.RESYNC_REQUIRED]
    status.write()
    written = json.loads((tmp_path / "status.json").read_text())
    assert (written["phase"], written["cause"]) == ("resync required", "integrity")


def test_progress_of_initial_replication_ends_with_it(tmp_path: Path) -> None:
    status = status_in(tmp_path)
    status.disks = [{"size_bytes": 8 * BLOCK_BYTES}]
    state = StreamStateFile(str(tmp_path), MACHINE)
    todo = BlockSet(8)
    todo.add_run(0, 6)
    state.save({0: todo}, generation=2, committed=1)
    stream = StreamState(Stamp(2, 1), NO_ATTEMPT, 7, 0, Watermark(MACHINE))
    status.learn(stream, state)
    assert (status.phase, status.generation, status.number) == (Phase.INITIAL, 2, 1)
    assert (status.done_bytes, status.total_bytes) == (2 * BLOCK_BYTES, 8 * BLOCK_BYTES)
    state.save({0: BlockSet(8)}, seeded=True)
    status.learn(stream, state)
    assert (status.phase, status.done_bytes, status.total_bytes) == (Phase.REPLICATING, 0, 0)


def test_news_that_cannot_be_written_are_an_error_in_words(tmp_path: Path) -> None:
    status = status_in(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"status\.json"):
        status.write()

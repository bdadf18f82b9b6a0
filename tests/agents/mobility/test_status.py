"""What the agent tells of itself."""

import json
import os
import uuid
from pathlib import Path

import pytest

from agents.mobility.status import RECORDS_MAX, AgentStatus, ChangesetRecord
from agents.mobility.stream_state import StreamStateFile
from replication.bookmark import Stamp
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
    assert not (tmp_path / "status.json.new").exists()


def test_news_that_cannot_be_written_are_an_error_in_words(tmp_path: Path) -> None:
    status = status_in(tmp_path / "gone")
    with pytest.raises(StorageError, match=r"status\.json"):
        status.write()

"""What whoever writes into the cache storage account can make the agent believe, and what not."""

import os
import uuid
from pathlib import Path

import pytest

from agents.mobility.app_scripts import check_scripts
from agents.mobility.bookkeeping import settle, take_up_repair
from agents.mobility.device import DeviceIdentity
from agents.mobility.resync_stage import Stage
from agents.mobility.stream_state import StreamStateFile
from replication.bookmark import GENERATION_LEAP_MAX, NOTHING, Stamp
from replication.document import UINT_MAX
from replication.errors import ConfigError, PeerError
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Repair, RepairRun, Watermark

MACHINE = uuid.UUID(int=9)
COUNT = 128
IDENTITY = DeviceIdentity("boot", "7:1", 4, COUNT * 4096, "")
STRANGER = 65534


@pytest.fixture
def state(tmp_path: Path) -> StreamStateFile:
    made = StreamStateFile(str(tmp_path), MACHINE)
    reconciled(made, NOTHING)
    return made


def reconciled(state: StreamStateFile, applied: Stamp) -> None:
    stream = StreamState(NOTHING, NO_ATTEMPT, 0, 0, Watermark(MACHINE, applied=applied))
    settle(state, stream, {0: COUNT}, {0: IDENTITY})


def test_forged_generation_does_not_use_the_numbers_up(state: StreamStateFile) -> None:
    with pytest.raises(PeerError, match="generation 4294967295"):
        reconciled(state, Stamp((1 << 32) - 1, 1))
    assert state.position.generation == 1
    assert state.position.resync is None
    reconciled(state, Stamp(1 + GENERATION_LEAP_MAX, 1))
    assert state.position.stage is Stage.REQUIRED


def test_forged_repair_request_does_not_hide_the_true_ones(state: StreamStateFile) -> None:
    state.todo[0].clear()
    assert take_up_repair(state, Repair(UINT_MAX, (RepairRun(0, 3, 1),)))
    assert take_up_repair(state, Repair(5, (RepairRun(0, 70, 2),)))
    assert list(state.todo[0].runs()) == [(3, 1), (70, 2)]
    assert state.position.repairing == 5
    assert not take_up_repair(state, Repair(5, (RepairRun(0, 70, 2),)))


def test_watermark_that_is_gone_asks_for_nothing(state: StreamStateFile) -> None:
    assert take_up_repair(state, Repair(5, (RepairRun(0, 70, 2),)))
    assert not take_up_repair(state, Repair())
    assert state.position.repairing == 5


@pytest.mark.parametrize("mode", [0o755, 0o775])
def test_script_in_a_folder_of_somebody_else_is_refused(tmp_path: Path, mode: int) -> None:
    """Whoever owns the folder can put another script there once this one was looked at."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    script = folder / "quiesce"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    check_scripts([str(script)])
    folder.chmod(mode)
    os.chown(folder, STRANGER if mode == 0o755 else 0, STRANGER)
    with pytest.raises(ConfigError, match="can replace the script"):
        check_scripts([str(script)])


def test_script_behind_a_link_of_somebody_else_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "quiesce").symlink_to("/bin/true")
    os.chown(folder, STRANGER, STRANGER)
    with pytest.raises(ConfigError, match="can replace the script"):
        check_scripts([str(folder / "quiesce")])
    os.chown(folder, 0, 0)
    check_scripts([str(folder / "quiesce")])
    os.chown(folder / "quiesce", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(ConfigError, match="can replace the script"):
        check_scripts([str(folder / "quiesce")])

"""The folder of a machine's state."""

import os
import uuid
from pathlib import Path

import pytest

from agents.mobility.app_scripts import is_post_due, set_post_due
from agents.mobility.machine_folder import forget, hold, machine_folder, run_owed_scripts
from agents.mobility.stream_state import StreamStateFile
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.pins import ROOT
from replication.block_set import BlockSet
from replication.errors import ConfigError
from tests.agents.mobility.conftest import MakeLoopDisk, OpenDevice


def test_second_agent_of_a_machine_is_refused(machine: uuid.UUID, tmp_path: Path) -> None:
    with (
        hold(str(tmp_path), machine),
        pytest.raises(ConfigError, match="another agent of machine"),
        hold(str(tmp_path), machine),
    ):
        pass
    with hold(str(tmp_path), machine):
        pass


def test_end_of_protection_leaves_no_tracker_and_no_stream(
    machine: uuid.UUID, tmp_path: Path, loop_disk: MakeLoopDisk, open_device: OpenDevice
) -> None:
    device = open_device(loop_disk(1 << 20).path)
    EbpfTracker.attach(machine, 0, device).close()
    state = StreamStateFile(str(tmp_path), machine)
    state.save({0: BlockSet.full(256)}, generation=3, committed=1)
    state.retain(1, 0, {0: BlockSet(256)})
    with hold(str(tmp_path), machine):
        set_post_due(state.folder)
        forget(str(tmp_path), machine)
        assert not os.path.exists(f"{ROOT}/{machine}")
        assert sorted(os.listdir(state.folder)) == ["agent.lock", "post.due"]
        forget(str(tmp_path), machine)
    assert StreamStateFile(str(tmp_path), machine).position.generation == 0


def test_half_forgotten_stream_is_none(machine: uuid.UUID, tmp_path: Path) -> None:
    """The position goes first: what is left of the rest says nothing any more."""
    state = StreamStateFile(str(tmp_path), machine)
    state.save({0: BlockSet(256)}, generation=3, committed=1)
    state.retain(1, 0, {0: BlockSet(256)})
    os.unlink(os.path.join(state.folder, "stream.state"))
    again = StreamStateFile(str(tmp_path), machine)
    assert (again.position.generation, again.retained()) == (0, {})


def test_nothing_to_forget_is_fine(machine: uuid.UUID, tmp_path: Path) -> None:
    forget(str(tmp_path), machine)
    assert not os.path.exists(machine_folder(str(tmp_path), machine))


def test_owed_scripts_are_left_to_an_agent_that_runs(machine: uuid.UUID, tmp_path: Path) -> None:
    folder = machine_folder(str(tmp_path), machine)
    assert run_owed_scripts(str(tmp_path), machine, [], 5) is None
    with hold(str(tmp_path), machine):
        set_post_due(folder)
        assert run_owed_scripts(str(tmp_path), machine, [], 5) is None
        assert is_post_due(folder)
    report = run_owed_scripts(str(tmp_path), machine, [], 5)
    assert report is not None
    assert report.ok
    assert not is_post_due(folder)


def test_one_agent_a_machine_on_a_host_whatever_their_folders(tmp_path: Path) -> None:
    machine = uuid.uuid4()
    with (
        hold(str(tmp_path / "one"), machine),
        pytest.raises(ConfigError, match="with another state folder"),
        hold(str(tmp_path / "other"), machine),
    ):
        pass
    with hold(str(tmp_path / "other"), machine):
        pass

"""Captures of real disks under real writers: what a point promises is what the replica holds."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from agents.mobility.bookkeeping import finish, make_pending
from agents.mobility.capture import Capture
from agents.mobility.config import CaptureConfig
from agents.mobility.freeze import Freezer
from agents.mobility.stream_state import Pending, StreamStateFile
from replication.bookmark import Consistency, Stamp

if TYPE_CHECKING:
    import contextlib
    import uuid
    from pathlib import Path

    from tests.agents.mobility.conftest import MakeLoopDisk

from tests.agents.mobility.capture_rig import (
    MIB,
    QUICK,
    SIZES,
    LookInto,
    Machine,
    Meddled,
    Mount,
    Worker,
    file_writer,
    last_record,
    mounter,
    raw_writer,
    replace_config,
    replica_mounter,
    unrest,
)


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


@pytest.fixture
def mount(tmp_path: Path, opened: contextlib.ExitStack) -> Mount:
    return mounter(tmp_path, opened)


@pytest.fixture
def look_into(tmp_path: Path) -> LookInto:
    return replica_mounter(tmp_path)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_points_of_a_busy_file_system_are_instants(
    kind: str, source: Machine, loop_disk: MakeLoopDisk, mount: Mount, look_into: LookInto
) -> None:
    disk = loop_disk(SIZES[kind])
    point = mount(disk, kind)
    source.protect(disk)
    seen = []
    with Worker(file_writer([point])) as writer:
        writer.wait_for(3)
        for _ in range(2 if kind == "xfs" else 4):
            before = writer.count
            taken = source.capture()
            after = writer.count
            assert (taken.consistency, taken.reason) == (Consistency.CRASH, "")
            assert taken.pause_ns > 0
            assert taken.captured_ns <= taken.time_ns
            with look_into(source.replica.images[0]) as replica:
                seen.append(last_record(replica / "records"))
                assert before <= seen[-1] <= after + 1
            writer.wait_for(after + 5)
    assert seen == sorted(set(seen))
    source.capture()
    assert source.loses_nothing()


def test_points_of_two_disks_are_one_instant(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, look_into: LookInto
) -> None:
    disks = [loop_disk(SIZES["ext4"]), loop_disk(SIZES["ext4"])]
    points = [mount(disk, "ext4") for disk in disks]
    source.protect(*disks)
    with Worker(file_writer(points)) as writer:
        writer.wait_for(3)
        for _ in range(4):
            assert source.capture().consistency is Consistency.CRASH
            newest = []
            for index in (0, 1):
                with look_into(source.replica.images[index]) as replica:
                    newest.append(last_record(replica / "records"))
            assert newest[0] - newest[1] in (0, 1)
            writer.wait_for(writer.count + 3)


def test_idle_machine_is_never_frozen(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    (point / "file").write_bytes(b"content" * 1000)
    os.sync()
    for _ in range(3):
        taken = source.capture()
    assert taken.consistency is Consistency.CRASH
    assert taken.pause_ns == 0
    assert not source.received.extents
    assert len(taken.audit) == QUICK.audit_chunks
    assert source.loses_nothing()


def test_backlog_is_cut_into_parts_until_none_is_left(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(160 * MIB)
    noise = os.urandom(MIB)
    with open(disk.path, "r+b") as file:
        for at in (0, 5, 6, 7, 30, *range(60, 80), 100, 101, 120, 159):
            os.pwrite(file.fileno(), noise, at * MIB)
        os.fsync(file.fileno())
    source.config = CaptureConfig(changeset_bytes_max=16 * MIB)
    source.protect(disk)
    reasons = []
    changed = False
    while not source.state.position.seeded:
        taken = source.capture()
        reasons.append((taken.consistency, taken.whole, taken.reason))
        if not changed:
            changed = True
            disk.write([0, 61 * 256, 159 * 256, 90 * 256], b"n")
    assert len(reasons) == 2
    assert reasons[0] == (Consistency.NONE, False, "initial replication is under way")
    assert reasons[-1] == (Consistency.CRASH, True, "")
    assert not any(source.state.todo.values())
    assert source.loses_nothing()


def test_capture_that_was_killed_at_any_point_is_taken_anew_without_loss(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 * MIB)
    source.protect(disk)
    source.seed()
    for blocks in ([1, 2, 3], [3, 4], [5]):
        disk.write(blocks, os.urandom(1))
        source.capture(commit=False)  # as if the agent died before its commit
        source.state = StreamStateFile(str(source.folder / "state"), source.id)
    source.capture()
    assert source.received.blocks(0) == {1, 2, 3, 4, 5}
    assert source.loses_nothing()


def test_no_capture_begins_while_a_commit_is_pending(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 * MIB)
    source.protect(disk)
    source.seed()
    disk.write([7])
    taken = source.capture(commit=False)
    pending = Pending(Stamp(1, 2), b"a" * 16, whole=True)
    make_pending(source.state, pending, taken.sent, audit_chunk=0)
    disk.write([7], b"y")
    with pytest.raises(AssertionError, match="settled first"):
        source.capture()
    finish(source.state)
    source.capture()
    assert source.received.blocks(0) == {7}


def test_freeze_that_fails_gives_no_point(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    source.freezer = Meddled(source.freezer)
    with Freezer() as other:
        source.freezer.before_freeze = lambda: other.freeze([str(point)], 20)
        taken = source.capture(on_add=unrest(point))
        other.thaw()
    source.freezer.before_freeze = lambda: None
    assert taken.consistency is Consistency.NONE
    assert "frozen already" in taken.reason
    assert not taken.audit
    source.capture()
    assert source.loses_nothing()


def test_freeze_that_ends_early_gives_no_point(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    source.config = replace_config(freeze_seconds_max=0.2)
    source.freezer = Meddled(source.freezer)
    with Worker(file_writer([point])) as writer:
        writer.wait_for(3)
        source.freezer.while_frozen = lambda: time.sleep(0.6)
        taken = source.capture()
        assert taken.consistency is Consistency.NONE
        assert "time limit" in taken.reason
        assert not taken.audit
    source.freezer.while_frozen = lambda: None
    source.capture()
    assert source.loses_nothing()


def test_scan_gives_points_of_a_quiet_disk_alone(source: Machine, loop_disk: MakeLoopDisk) -> None:
    disk = loop_disk(4 << 20)
    disk.write([3, 9])
    source.protect(disk, scan=True)
    first = source.capture()
    assert first.consistency is Consistency.CRASH
    disk.write([5], b"z")
    with Worker(raw_writer(disk, 100)) as writer:
        writer.wait_for(3)
        assert source.capture().consistency is Consistency.NONE
    assert source.capture().consistency is Consistency.CRASH
    assert source.loses_nothing()


def test_clock_that_is_set_back_during_a_capture_does_not_turn_time_around(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    source.protect(loop_disk(1 << 20))
    times = iter([10**18, *range(10**17, 10**17 + 1000)])
    builder, _ = source.replica.builder()
    taken = Capture(
        source.disks,
        source.state,
        source.freezer,
        builder,
        source.config,
        clock_ns=lambda: next(times),
    ).run()
    assert taken.captured_ns == taken.time_ns == 10**18

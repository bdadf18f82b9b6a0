"""Captures whose file systems come, go, hide, or share their disk with other writers."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest

from replication.block_set import BLOCK_BYTES
from replication.bookmark import Consistency

if TYPE_CHECKING:
    import contextlib
    import uuid
    from pathlib import Path

    from agents.mobility.frame_builder import FrameContent
    from tests.agents.mobility.conftest import MakeLoopDisk

from tests.agents.mobility.capture_rig import (
    DURING_READS,
    MIB,
    RAW_BYTES,
    SIZES,
    Machine,
    Meddled,
    Mount,
    Worker,
    file_writer,
    mounter,
    raw_writer,
    unrest,
)


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


@pytest.fixture
def mount(tmp_path: Path, opened: contextlib.ExitStack) -> Mount:
    return mounter(tmp_path, opened)


def test_raw_disk_has_points_when_it_is_quiet_and_says_so_when_it_is_not(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 << 20)
    source.protect(disk)
    with Worker(raw_writer(disk, 100)) as writer:
        writer.wait_for(3)
        taken = source.capture()
        assert taken.consistency is Consistency.NONE
        assert "written to all the time" in taken.reason
    taken = source.capture()
    assert taken.consistency is Consistency.CRASH
    assert taken.pause_ns == 0
    assert source.loses_nothing()


def test_writes_beside_a_frozen_file_system_to_blocks_already_marked_are_noticed(
    source: Machine, loop_disk: MakeLoopDisk, tmp_path: Path
) -> None:
    """As swap or a database on another partition of the disk does; the bits show nothing of it."""
    disk = loop_disk(RAW_BYTES + (16 << 20))
    command = ["mkfs.ext4", "-q", "-F", "-b", "4096", disk.path, str(RAW_BYTES // BLOCK_BYTES)]
    subprocess.run(command, check=True, capture_output=True)
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mount", disk.path, str(point)], check=True)
    source.opened.callback(subprocess.run, ["umount", "-l", str(point)], check=False)
    source.protect(disk)
    source.seed()
    beside = RAW_BYTES // BLOCK_BYTES + 5
    source.freezer = Meddled(source.freezer)

    def write_while_it_is_read() -> None:
        disk.write([beside], b"1")  # marked from now on
        DURING_READS.append(lambda: disk.write([beside], b"2"))

    source.freezer.while_frozen = write_while_it_is_read
    try:
        taken = source.capture(on_add=unrest(point))
    finally:
        DURING_READS.clear()
    assert taken.consistency is Consistency.NONE
    assert "was written to while" in taken.reason
    # What stands still while it is read does no harm, whenever it was written.
    source.freezer.while_frozen = lambda: disk.write([beside], b"3")
    assert source.capture(on_add=unrest(point)).consistency is Consistency.CRASH
    assert source.replica.images[0][beside * BLOCK_BYTES] == ord("3")
    source.freezer.while_frozen = lambda: None
    source.capture()
    assert source.loses_nothing()


def test_file_system_that_is_mounted_after_the_look_is_not_taken_for_frozen(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disks = [loop_disk(SIZES["ext4"]), loop_disk(SIZES["ext4"])]
    points = [mount(disk, "ext4") for disk in disks]
    source.protect(*disks)
    source.seed()
    subprocess.run(["umount", str(points[1])], check=True)
    source.freezer = Meddled(source.freezer)

    def mount_again() -> None:
        subprocess.run(["mount", disks[1].path, str(points[1])], check=True)

    def write_to_it() -> None:
        step = file_writer([points[1]])
        for number in range(3):
            step(number)

    source.freezer.before_freeze = mount_again
    source.freezer.while_frozen = write_to_it
    taken = source.capture(on_add=unrest(points[0]))
    assert points[1].is_mount()
    # Whether those writes came before or after the look at the counters, the point is an instant.
    if taken.consistency is Consistency.CRASH:
        assert source.replica.images[1] == source.disks[1].read_blocks(
            0, source.disks[1].block_count
        )
    source.freezer.before_freeze = source.freezer.while_frozen = lambda: None
    source.capture()
    assert source.loses_nothing()


def test_file_system_that_went_away_before_the_freeze_gives_no_point(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    source.freezer = Meddled(source.freezer)
    source.freezer.before_freeze = lambda: subprocess.run(["umount", str(point)], check=True)
    taken = source.capture(on_add=unrest(point))
    assert taken.consistency is Consistency.NONE
    assert "nothing is mounted there" in taken.reason
    source.freezer.before_freeze = lambda: None
    assert source.capture().consistency is Consistency.CRASH
    assert source.loses_nothing()


def test_covered_mount_costs_the_point_and_not_the_replication(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    fd = os.open(point / "file", os.O_RDWR | os.O_CREAT)
    source.opened.callback(os.close, fd)

    def write(_content: FrameContent | None = None) -> None:
        os.pwrite(fd, os.urandom(9000), 0)
        os.fsync(fd)

    write()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(point)], check=True)
    try:
        taken = source.capture(on_add=write)
    finally:
        subprocess.run(["umount", str(point)], check=True)
    assert taken.consistency is Consistency.NONE
    assert "covered by another mount" in taken.reason
    assert source.received.extents
    assert source.capture().consistency is Consistency.CRASH
    assert source.loses_nothing()


def test_file_system_mounted_twice_is_frozen_once(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, tmp_path: Path
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    for number, options in enumerate(("bind", "bind,ro")):
        other = tmp_path / f"again{number}"
        other.mkdir()
        subprocess.run(["mount", "-o", options, str(point), str(other)], check=True)
        source.opened.callback(subprocess.run, ["umount", "-l", str(other)], check=False)
    source.protect(disk)
    assert len(source.disks[0].file_systems()) == 1
    taken = source.capture(on_add=unrest(point))
    assert taken.consistency is Consistency.CRASH
    assert taken.pause_ns > 0
    source.capture()
    assert source.loses_nothing()


def test_read_only_file_system_needs_no_freeze(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    source.protect(disk)
    assert source.disks[0].file_systems() == []
    taken = source.capture()
    assert (taken.consistency, taken.pause_ns) == (Consistency.CRASH, 0)
    assert source.loses_nothing()


def test_file_system_over_two_disks_is_frozen_once_for_both(
    source: Machine, loop_disk: MakeLoopDisk, tmp_path: Path
) -> None:
    disks = [loop_disk(160 * MIB), loop_disk(160 * MIB)]
    paths = [disk.path for disk in disks]
    point = tmp_path / "mnt"
    point.mkdir()
    subprocess.run(["mkfs.btrfs", "-q", "-f", "-d", "raid1", "-m", "raid1", *paths], check=True)
    subprocess.run(["mount", paths[0], str(point)], check=True)
    source.opened.callback(subprocess.run, ["umount", "-l", str(point)], check=False)
    source.protect(*disks)
    found = [[fs.mount_point for fs in disk.file_systems()] for disk in source.disks]
    assert found == [[str(point)]] * 2
    source.seed()
    taken = source.capture(on_add=unrest(point))
    assert (taken.consistency, taken.reason) == (Consistency.CRASH, "")
    assert taken.pause_ns > 0
    assert source.received.blocks(0)
    assert source.received.blocks(1)
    source.capture()
    assert source.loses_nothing()

"""Points of busy raw disks by clones of their images."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from replication.bookmark import Consistency
from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk

if TYPE_CHECKING:
    import contextlib
    import uuid
    from pathlib import Path

from tests.agents.mobility.capture_rig import (
    SIZES,
    Machine,
    Mount,
    Worker,
    mounter,
    raw_numbers,
    raw_writer,
    replace_config,
)


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


@pytest.fixture
def mount(tmp_path: Path, opened: contextlib.ExitStack) -> Mount:
    return mounter(tmp_path, opened)


def test_busy_raw_disk_has_points_by_clones_of_its_image(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, opened: contextlib.ExitStack
) -> None:
    store = mount(loop_disk(SIZES["xfs"]), "xfs")
    disk = LoopDisk(store / "disk.img", 8 << 20)
    opened.callback(disk.detach)
    source.config = replace_config(raw_capture="reflink", rounds_max=2)
    source.protect(disk)
    with Worker(raw_writer(disk, 100, 40)) as writer:
        writer.wait_for(3)
        newest = 0
        for _ in range(5):
            before = writer.count
            taken = source.capture()
            assert (taken.consistency, taken.reason) == (Consistency.CRASH, "")
            assert taken.audit == ()
            numbers = raw_numbers(source.replica.images[0], 100, 40)
            assert numbers == sorted(numbers, reverse=True)
            assert numbers[0] - numbers[-1] in (0, 1)
            assert numbers[-1] >= before > newest
            newest = before
            writer.wait_for(writer.count + 3)
    assert os.listdir(store) == ["disk.img"]
    source.capture()
    assert source.loses_nothing()


def test_image_that_cannot_be_cloned_costs_the_point(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(8 << 20)
    source.config = replace_config(raw_capture="reflink")
    source.protect(disk)
    with Worker(raw_writer(disk, 100)) as writer:
        writer.wait_for(3)
        os.rename(disk.image, f"{disk.image}.old")
        disk.image.write_bytes(b"")
        taken = source.capture()
    assert taken.consistency is Consistency.NONE
    assert "cloned" in taken.reason or "no longer the image" in taken.reason
    os.rename(f"{disk.image}.old", disk.image)

"""The audit tells what the source holds, and goes over all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agents.mobility.capture import Capture
from replication.block_set import BLOCK_BYTES
from replication.checksum import CHUNK_BYTES, block_digests, chunk_digest

if TYPE_CHECKING:
    import contextlib
    import uuid
    from pathlib import Path

    from tests.agents.mobility.conftest import MakeLoopDisk

from tests.agents.mobility.capture_rig import Machine, replace_config


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


def test_change_behind_the_trackers_back_shows_in_the_audit(
    source: Machine, loop_disk: MakeLoopDisk
) -> None:
    disk = loop_disk(1 << 20)
    disk.write(range(0, 256, 3), b"d")
    source.protect(disk)
    source.seed()
    with open(disk.image, "r+b") as image:
        image.seek(37 * BLOCK_BYTES)
        image.write(b"rot")
    differing = []
    for _ in range(2):
        builder, _received = source.replica.builder()
        taken = Capture(source.disks, source.state, source.freezer, builder, source.config).run()
        for found in taken.audit:
            start = found.chunk * CHUNK_BYTES
            chunk = source.replica.images[0][start : start + CHUNK_BYTES]
            if found.digest != chunk_digest(block_digests(chunk)):
                differing.append(found.chunk)
    assert differing == [37 // 16] * 2


def test_audit_walks_over_all_disks_in_turn(source: Machine, loop_disk: MakeLoopDisk) -> None:
    disks = [loop_disk(5 * CHUNK_BYTES), loop_disk(3 * CHUNK_BYTES + 512)]
    source.protect(*disks)
    source.config = replace_config(audit_chunks=4)
    seen = []
    for _ in range(5):
        seen += [(found.disk, found.chunk) for found in source.capture().audit]
    every = [*((0, chunk) for chunk in range(5)), *((1, chunk) for chunk in range(4))]
    assert seen == (every * 3)[:20]

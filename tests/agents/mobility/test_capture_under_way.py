"""A write that is under way while a changeset is taken: what no process may be alone to know."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from replication.bookmark import Consistency
from tests.agents.mobility.capture_rig import MIB, Machine
from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk
from tests.agents.mobility.tracker.test_in_flight import StalledStore

if TYPE_CHECKING:
    import contextlib
    import uuid
    from pathlib import Path


def test_a_write_under_way_stays_to_do_on_disk_when_there_is_no_point(
    machine: uuid.UUID, loop_disk: MakeLoopDisk, tmp_path: Path, opened: contextlib.ExitStack
) -> None:
    store = StalledStore(loop_disk(64 * MIB).path, tmp_path / "store")
    opened.callback(store.close)
    disk = LoopDisk(store.folder / "disk.img", 8 * MIB)
    opened.callback(disk.detach)
    disk.write([5, 77], b"o")
    source = Machine(machine, tmp_path, opened)
    source.protect(disk)
    source.seed()
    disk.write([5], b"n")
    store.stall()
    writer = threading.Thread(target=disk.write, args=([77], b"n"))
    writer.start()
    try:
        deadline = time.monotonic() + 10
        while 77 not in source.disks[0].tracker.peek_running():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        taken = source.capture()
        assert taken.consistency is Consistency.NONE
        assert 77 in source.received.blocks(0)
        # Committed, and without what this process remembers: only the state file counts.
        assert list(source.state.todo[0].runs()) == [(77, 1)]
    finally:
        store.go_on()
        writer.join(10)
    source.seed()
    assert source.loses_nothing()

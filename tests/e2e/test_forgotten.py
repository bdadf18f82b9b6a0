"""Everything has forgotten the machine but its store: agent, process server, cache."""

import os
import shutil

import pytest

from tests.e2e.rig import Rig

_MIB = 1 << 20


@pytest.mark.soak
def test_another_stream_by_the_same_numbers_never_gets_into_the_store(rig: Rig) -> None:
    """The applier is heard when the new stream has passed the number that its store is at."""
    disk = rig.add_disk(8 * _MIB)
    rig.settings["agent"] = {"capture": {"audit_chunks": 0, "heartbeat_seconds": 0.3}}
    disk.write(0, os.urandom(8 * _MIB))
    rig.start()
    rig.wait_for_point()
    for part in (rig.agent, rig.process_server, rig.applier, rig.azure):
        part.stop()
    for forgotten in (rig.agent_state, rig.spool, rig.azurite_data):
        shutil.rmtree(forgotten)
    number = rig.positions()[-1].bookmark.stamp.number
    disk.write(4 * _MIB, os.urandom(_MIB))
    for part in (rig.azure, rig.process_server, rig.agent):
        part.start()
    rig.wait_until("a stream", lambda: rig.agent_status().get("number", 0) > number + 1)
    rig.applier.start()
    rig.assert_newest_equals_source()
    assert rig.points()[-1].bookmark.stamp.generation == 2
    assert rig.events()[0]["code"] == "basis"

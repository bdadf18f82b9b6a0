"""A quiet machine is left quiet, and its points stay fresh all the same."""

import time
from typing import Any

from tests.e2e.order import record_files, writing
from tests.e2e.rig import Rig

_MIB = 1 << 20
HEARTBEAT_SECONDS = 3.0
WATCHED_SECONDS = 10.0
OWN_BYTES_MAX = 64 << 10
"""XFS covers its log about half a minute after the last write: a few blocks of its own, once."""
AGENT_CPU_SHARE_MAX = 0.05


def test_a_quiet_machine_sends_heartbeats_alone(rig: Rig) -> None:
    disks = [rig.add_disk(64 * _MIB, "ext4"), rig.add_disk(300 * _MIB, "xfs")]
    rig.settings["agent"] = {"capture": {"heartbeat_seconds": HEARTBEAT_SECONDS}}
    rig.start()
    rig.wait_for_point()
    with writing("files", *record_files(disks)):
        rig.wait_for_point()
    rig.wait_until("quiet", lambda: _is_quiet(rig), seconds_max=90)
    before, cpu_before = len(_records(rig)), rig.agent.cpu_seconds()
    ages = []
    began = time.monotonic()
    while time.monotonic() < began + WATCHED_SECONDS:
        time.sleep(0.2)
        ages.append(time.time() - rig.points()[-1].bookmark.time_ns / 1e9)
    fresh = _records(rig)[before:]
    own = [record["changed_bytes"] for record in fresh if record["changed_bytes"]]
    assert sum(own) <= OWN_BYTES_MAX
    assert len(own) <= 1
    assert 2 <= len(fresh) <= WATCHED_SECONDS / HEARTBEAT_SECONDS + 1 + len(own)
    assert [record["pause_seconds"] for record in fresh] == [0] * len(fresh)
    assert {record["consistency"] for record in fresh} == {"crash"}
    assert max(ages) < HEARTBEAT_SECONDS + 3
    assert rig.agent.cpu_seconds() - cpu_before < AGENT_CPU_SHARE_MAX * WATCHED_SECONDS
    for disk in disks:
        disk.unmount()
    rig.assert_newest_equals_source()


def _records(rig: Rig) -> list[dict[str, Any]]:
    return list(rig.agent_status()["records"])


def _is_quiet(rig: Rig) -> bool:
    """Two heartbeats in a row that found nothing: what file systems do by themselves is over."""
    last = _records(rig)[-2:]
    return len(last) == 2 and all(record["changed_bytes"] == 0 for record in last)

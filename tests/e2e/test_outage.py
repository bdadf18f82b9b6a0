"""The cache storage account is away while disks change: nothing grows, everything catches up."""

import time

import pytest

from tests.e2e.load import churning
from tests.e2e.rig import Rig

_MIB = 1 << 20
AGENT_GROWTH_BYTES_MAX = 32 * _MIB
AGENT_BYTES_MAX = 256 * _MIB


def test_an_outage_of_the_cache_is_caught_up(rig: Rig) -> None:
    check_outage(rig, seconds=15)


@pytest.mark.soak
def test_an_outage_of_a_minute_is_caught_up(rig: Rig) -> None:
    check_outage(rig, seconds=60)


def check_outage(rig: Rig, *, seconds: float) -> None:
    disk = rig.add_disk(256 * _MIB, "ext4")
    rig.settings["process-server"] = {"spool": {"bytes_max": 64 * _MIB}}
    rig.start()
    rig.wait_for_point()
    with churning("files", disk.mount_point, per_second=400):
        rig.wait_for_point()
        rig.azure.stop()
        began = time.monotonic()
        rig.wait_until("the spool to fill", lambda: _refused(rig), seconds_max=60)
        resident: list[int] = []
        while time.monotonic() < began + seconds or len(resident) < 50:
            resident.append(rig.agent.resident_bytes())
            assert rig.process_server.metric("understudy_spool_bytes") <= 64 * _MIB + _MIB
            assert "process server" in rig.agent.health()["warnings"]
            time.sleep(0.1)
        assert max(resident) - resident[0] < AGENT_GROWTH_BYTES_MAX
        assert max(resident) < AGENT_BYTES_MAX
        rig.azure.start()
        rig.wait_for_point()
    disk.unmount()
    rig.assert_newest_equals_source(120)
    rig.assert_one_unbroken_stream()
    rig.wait_until("the spool to drain", lambda: _spool_bytes(rig) < _MIB, seconds_max=30)
    assert rig.agent.health()["state"] == "normal"


def _refused(rig: Rig) -> bool:
    return rig.process_server.metric("understudy_refusals_total", code="spool_full") > 0


def _spool_bytes(rig: Rig) -> float:
    return rig.process_server.metric("understudy_spool_bytes")

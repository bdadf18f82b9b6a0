"""Whatever changes a disk in whatever way: after the last changeset the seed is the source."""

import contextlib
import random
import time

import pytest

from tests.e2e.load import churning
from tests.e2e.rig import Rig

_MIB = 1 << 20


def test_all_ways_to_change_a_disk_arrive(rig: Rig) -> None:
    check_churn(rig, seconds=12, kills=0)


def test_all_ways_to_change_a_disk_arrive_when_the_agent_is_killed(rig: Rig) -> None:
    check_churn(rig, seconds=0, kills=5)


@pytest.mark.soak
def test_all_ways_to_change_a_disk_arrive_for_long(rig: Rig) -> None:
    check_churn(rig, seconds=180, kills=0)


@pytest.mark.soak
def test_all_ways_to_change_a_disk_arrive_when_the_agent_is_killed_for_long(rig: Rig) -> None:
    check_churn(rig, seconds=0, kills=60)


def check_churn(rig: Rig, *, seconds: float, kills: int) -> None:
    raw = rig.add_disk(32 * _MIB)
    with_files = rig.add_disk(128 * _MIB, "ext4")
    rig.settings["agent"] = {"capture": {"interval_seconds": 0.02}}
    rig.start()
    rig.wait_for_point()
    before = rig.positions()[-1].bookmark.stamp.number
    chance = random.Random(7)
    with contextlib.ExitStack() as load:
        load.enter_context(churning("device", raw.device, seed=1))
        load.enter_context(churning("files", with_files.mount_point, seed=2))
        time.sleep(seconds)
        for _ in range(kills):
            time.sleep(chance.uniform(0.2, 2.0))
            rig.kill(rig.agent)
            time.sleep(chance.uniform(0.0, 1.0))
            rig.agent.start()
    with_files.unmount()
    point = rig.assert_newest_equals_source()
    # On a busy machine they come seldom; that there were some in the middle of it is what counts.
    assert point.bookmark.stamp.number - before >= max(seconds, kills) / 4
    rig.assert_one_unbroken_stream()

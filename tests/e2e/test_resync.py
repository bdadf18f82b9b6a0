"""A machine whose changes do not join on is compared, and what differs is sent: nothing else."""

import datetime as dt
import json
import os
import random
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agents.mobility.leave import leave_order
from agents.mobility.stream_state import StreamStateFile
from agents.mobility.tracker.pins import remove_machine
from appliance.applier.store import RottenBlockError
from replication.block_set import BLOCK_BYTES
from replication.bookmark import Consistency
from tests.e2e.counting_proxy import counting
from tests.e2e.disk import Disk, run
from tests.e2e.part import ROOT
from tests.e2e.rig import Rig

_MIB = 1 << 20
DISK_BYTES = 64 * _MIB
CHUNK_BYTES = 65536
UNCHANGED_WIRE_BYTES_MAX = DISK_BYTES // 4096
"""An unchanged disk of 4 GiB moves less than 1 MiB: this is the same share of a smaller one."""

FIXED_WIRE_BYTES_MAX = 48 << 10
"""Handshakes, state documents, manifests: they do not grow with the disk."""


@pytest.fixture
def disk(rig: Rig) -> Disk:
    """A raw disk, two thirds of it full of bytes that do not shrink."""
    made = rig.add_disk(DISK_BYTES)
    rig.settings["agent"] = {"capture": {"audit_chunks": 0, "compare_share_max": 1.0}}
    rig.settings["applier"] = {"scrub_bytes_per_second": 0}
    made.write(0, os.urandom(40 * _MIB))
    return made


@pytest.fixture
def running(rig: Rig, disk: Disk) -> Rig:
    """Everything replicated, and at rest."""
    assert disk.device
    rig.start()
    rig.wait_for_point()
    rig.assert_newest_equals_source()
    return rig


def test_a_reboot_costs_a_comparison_and_what_differs(running: Rig, disk: Disk) -> None:
    rig = running
    old = rig.points()[-1]
    rig.agent.stop()
    _reboot(rig)
    disk.write(5 * _MIB, os.urandom(BLOCK_BYTES))
    disk.write(60 * _MIB, os.urandom(3 * BLOCK_BYTES))
    rig.agent.start()
    _await_generation(rig, 2)
    rig.assert_newest_equals_source()
    assert rig.agent_status()["sent_bytes"] < 3 * CHUNK_BYTES
    assert _resync_record(rig)["settled"]
    with rig.reader().open_view(old.position, 0) as view:
        assert view.read(0, BLOCK_BYTES)
    assert "cause=unclean-shutdown" in rig.agent.log.read_text()
    _assert_nothing_claimed_too_early(rig)


def test_an_order_on_an_unchanged_disk_moves_its_sums_alone(rig: Rig, disk: Disk) -> None:
    with counting(rig.data_port) as proxy:
        rig.settings["agent"]["process_server"] = f"https://127.0.0.1:{proxy.port}"
        rig.start()
        rig.wait_for_point()
        rig.assert_newest_equals_source()
        assert disk.size_bytes == DISK_BYTES
        before = proxy.passed_bytes
        _order(rig)
        _await_generation(rig, 2)
        moved = proxy.passed_bytes - before
        assert moved < UNCHANGED_WIRE_BYTES_MAX + FIXED_WIRE_BYTES_MAX
        assert rig.agent_status()["resync_request"] == 1
        rig.assert_newest_equals_source()
        rig.wait_until("the sums to go", lambda: not _sums_in_cache(rig))
        rig.agent.stop()


def test_a_disk_that_grew_sends_what_it_grew_by(running: Rig, disk: Disk) -> None:
    rig = running
    rig.agent.stop()
    with disk.image.open("r+b") as image:
        image.truncate(DISK_BYTES + 6 * _MIB + 512)
    run("losetup", "-c", disk.device)
    disk.write(DISK_BYTES + _MIB, os.urandom(2 * _MIB))
    rig.agent.start()
    _await_generation(rig, 2)
    point = rig.assert_newest_equals_source()
    assert point.disks[0].size_bytes == DISK_BYTES + 6 * _MIB + 512
    assert rig.agent_status()["sent_bytes"] < 3 * _MIB
    assert "cause=disk-resized" in rig.agent.log.read_text()


def test_lost_tracking_is_noticed_and_compared(running: Rig, disk: Disk) -> None:
    rig = running
    rig.agent.stop()
    remove_machine(rig.machine)
    disk.write(33 * _MIB + 4096, os.urandom(BLOCK_BYTES))
    disk.write(0, bytes(4 * _MIB))  # zeros now
    rig.agent.start()
    _await_generation(rig, 2)
    rig.assert_newest_equals_source()
    assert rig.agent_status()["sent_bytes"] < 3 * CHUNK_BYTES
    assert "cause=tracking-lost" in rig.agent.log.read_text()


@pytest.mark.parametrize("ordered", [True, False])
def test_a_byte_that_rots_and_is_found_by_verify_is_sent_again(
    running: Rig, disk: Disk, *, ordered: bool
) -> None:
    rig = running
    block = 2345
    rig.applier.stop()  # else it may merge the layer that is looked for
    with rig.reader().open_view(rig.points()[-1].position, 0) as view:
        file, offset = view._place(block)
    _flip(rig.store / "machines" / str(rig.machine) / file, offset + 77)
    found = subprocess.run(
        [
            *(sys.executable, "-m", "appliance.cli", "verify", str(rig.machine)),
            *("--store", str(rig.store)),
        ],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 6, found.stderr
    assert f"block {block}" in found.stderr
    if ordered:
        _order(rig)
        rig.wait_until("the order", lambda: rig.agent_status().get("cause") == "operator")
    rig.applier.start()
    if ordered:
        _await_generation(rig, 2)
    rig.wait_until("the block", lambda: _newest_reads(rig, disk, block))
    rig.assert_newest_equals_source()
    assert not json.loads((rig.store / "machines" / str(rig.machine) / "repair.json").read_text())[
        "runs"
    ]


def test_nothing_is_sent_before_leave_is_given(rig: Rig, disk: Disk) -> None:
    now = dt.datetime.now().astimezone()
    shut = [(now + dt.timedelta(hours=hours)).strftime("%H:%M") for hours in (2, 3)]
    rig.settings["agent"]["resync"] = f"window {shut[0]}-{shut[1]}"
    rig.start()
    rig.wait_for_point()
    rig.assert_newest_equals_source()
    rig.agent.stop()
    remove_machine(rig.machine)
    disk.write(7 * _MIB, os.urandom(BLOCK_BYTES))
    rig.agent.start()
    rig.wait_until("the need", lambda: rig.agent_status().get("phase") == "resync required")
    newest = rig.positions()[-1].bookmark.stamp
    disk.write(9 * _MIB, os.urandom(BLOCK_BYTES))
    time.sleep(3)
    assert rig.agent_status()["cause"] == "tracking-lost"
    assert rig.agent_status()["sent_bytes"] == 0
    assert rig.positions()[-1].bookmark.stamp == newest
    assert "a resync is required" in str(rig.agent.health())
    rig.agent.restart()
    rig.wait_until("the need", lambda: rig.agent_status().get("phase") == "resync required")
    _order(rig)
    _await_generation(rig, 2)
    rig.assert_newest_equals_source()


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_whoever_is_killed_while_a_resync_is_under_way(rig: Rig, disk: Disk, seed: int) -> None:
    chance = random.Random(seed)
    # Slow enough that kills find it comparing.
    rig.settings["agent"]["capture"]["compare_share_max"] = 0.05
    rig.start()
    rig.wait_for_point()
    rig.assert_newest_equals_source()
    rig.agent.stop()
    _reboot(rig)
    for _ in range(20):
        place = chance.randrange(DISK_BYTES // BLOCK_BYTES)
        disk.write(place * BLOCK_BYTES, os.urandom(BLOCK_BYTES))
    rig.agent.start()
    victims = [rig.agent, rig.applier, rig.azure, rig.agent, rig.process_server, rig.applier]
    chance.shuffle(victims)
    for victim in victims:
        time.sleep(chance.uniform(0.0, 1.2))
        place = chance.randrange(DISK_BYTES // BLOCK_BYTES)
        disk.write(place * BLOCK_BYTES, os.urandom(BLOCK_BYTES))
        rig.kill(victim)
        time.sleep(chance.uniform(0.0, 0.5))
        victim.start()
    _await_generation(rig, 2)
    rig.assert_newest_equals_source()


def _flip(path: Path, offset: int) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 0x10]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def _newest_reads(rig: Rig, disk: Disk, block: int) -> bool:
    with rig.reader().open_view(rig.points()[-1].position, disk.index) as view:
        try:
            view.read(block * BLOCK_BYTES, BLOCK_BYTES)
        except RottenBlockError:
            return False
    return True


def _order(rig: Rig) -> None:
    leave_order(str(rig.agent_state / str(rig.machine)))


def _await_generation(rig: Rig, generation: int) -> None:
    def has_come() -> bool:
        points = rig.points()
        return (
            rig.agent_status().get("phase") == "replicating"
            and bool(points)
            and points[-1].bookmark.stamp.generation >= generation
        )

    rig.wait_until(f"a point of generation {generation}", has_come)


def _reboot(rig: Rig) -> None:
    """What a power cut leaves: no trackers, and a state that is of another boot."""
    remove_machine(rig.machine)
    state = StreamStateFile(str(rig.agent_state), rig.machine)
    identities = {
        disk: type(identity)(**(identity.as_json() | {"boot_id": "another boot"}))  # type: ignore[arg-type]
        for disk, identity in state.position.identities.items()
    }
    state.save(identities=identities)


def _resync_record(rig: Rig) -> dict[str, Any]:
    path = rig.store / "machines" / str(rig.machine) / "resync.json"
    found: dict[str, Any] = json.loads(path.read_text())["begun"][-1]
    return found


def _sums_in_cache(rig: Rig) -> bool:
    """Whether Azurite knows a container of sums."""
    return any(
        b"-s0000" in path.read_bytes() and rig.machine.hex.encode() + b"-s" in path.read_bytes()
        for path in rig.azurite_data.glob("*.json")
    )


def _assert_nothing_claimed_too_early(rig: Rig) -> None:
    """Between what begins a generation and its end no point is restorable."""
    positions = rig.positions()
    for before, after in pairwise(positions):
        if after.bookmark.stamp.generation > before.bookmark.stamp.generation:
            began = after.bookmark
            if began.stamp.number == 1:
                assert began.consistency is Consistency.NONE

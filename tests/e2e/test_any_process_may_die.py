"""SIGKILL anywhere: every point stays a prefix, nothing is skipped, nothing starts anew."""

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from replication.bookmark import Stamp
from tests.e2e.order import assert_files_hold_prefix, record_files, writing
from tests.e2e.rig import Rig

_MIB = 1 << 20
WAYS_TO_KILL = 5
NAME_ALONE = "it is listed and cannot be read"
"""What the applier says of a manifest of which Azurite, killed, has kept the name and not the rest;
it is asked for again."""


class Heads:
    """What the store's newest changeset has been, looked at again and again."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.newest = Stamp(0, 0)

    def look(self) -> None:
        positions = self._rig.positions()
        if positions:
            stamp = positions[-1].bookmark.stamp
            assert stamp >= self.newest, f"the store went back from {self.newest} to {stamp}"
            assert stamp.generation == 1
            self.newest = stamp

    def watch(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.look()
            time.sleep(0.1)


def test_points_survive_random_kills(rig: Rig) -> None:
    check_kills(rig, kills=WAYS_TO_KILL, seed=3, checked_max=20)


@pytest.mark.soak
def test_points_survive_sixty_random_kills(rig: Rig) -> None:
    check_kills(rig, kills=64, seed=5, checked_max=60)


def check_kills(rig: Rig, *, kills: int, seed: int, checked_max: int) -> None:
    """Each way to kill about as often as the others; then so many of the points are checked."""
    disks = [rig.add_disk(256 * _MIB, "ext4", in_memory=True) for _ in range(2)]
    rig.start()
    rig.wait_for_point()
    chance = random.Random(seed)
    heads = Heads(rig)
    ways = _ways_to_kill(rig)
    assert len(ways) == WAYS_TO_KILL
    ways *= -(-kills // WAYS_TO_KILL)
    chance.shuffle(ways)
    with writing("files", *record_files(disks)):
        for way in ways[:kills]:
            heads.watch(chance.uniform(0.5, 2.5))
            way(chance)
        heads.watch(1.0)
        rig.wait_for_point()
    points = rig.points()
    chosen = chance.sample(points, min(checked_max, len(points)))
    for point in sorted(chosen, key=lambda point: point.position):
        assert_files_hold_prefix(rig, point, rig.scratch())
    for disk in disks:
        disk.unmount()
    rig.assert_newest_equals_source()
    heads.look()
    rig.assert_one_unbroken_stream()
    assert rig.events() == []


def _ways_to_kill(rig: Rig) -> list[Callable[[random.Random], None]]:
    def daemon(name: str) -> Callable[[random.Random], None]:
        part = next(part for part in rig.parts if part.name == name)

        def kill(chance: random.Random) -> None:
            rig.kill(part)
            time.sleep(chance.choice([0.0, chance.uniform(0.0, 2.0)]))
            part.start()

        return kill

    def azurite(_: random.Random) -> None:
        """Only Azurite's own processes: the emulator starts them again."""
        children = Path(f"/proc/{rig.azure.pid}/task/{rig.azure.pid}/children")
        rig.wait_until("Azurite's processes", lambda: len(children.read_text().split()) == 2)
        rig.note("killing Azurite below the emulator")
        for pid in map(int, children.read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    return [*map(daemon, [part.name for part in rig.parts]), azurite]


def test_a_lost_spool_is_sent_again_from_block_sets(rig: Rig) -> None:
    disks = [rig.add_disk(256 * _MIB, "ext4", in_memory=True) for _ in range(2)]
    ballast_bytes = 32 * _MIB
    with (disks[0].mount_point / "ballast").open("wb") as file:
        file.write(os.urandom(ballast_bytes))
        os.fsync(file.fileno())
    rig.start()
    rig.wait_for_point()
    with writing("files", *record_files(disks)):
        rig.wait_for_point()
        rig.azure.stop()  # what is committed from here on is in the spool alone
        committed = _committed(rig)
        rig.wait_until("changesets in the spool", lambda: _committed(rig) >= committed + 5)
        sent_before = rig.agent_status()["sent_bytes"]
        rig.kill(rig.process_server)
        shutil.rmtree(rig.spool)
        rig.azure.start()
        rig.process_server.start()
        point = rig.wait_for_point()
        assert_files_hold_prefix(rig, point, rig.scratch())
    for disk in disks:
        disk.unmount()
    rig.assert_newest_equals_source()
    rig.assert_one_unbroken_stream()
    assert "changesets were lost upstream" in rig.agent.log.read_text()
    # The ballast does not compress: it alone would be more. How much else there is, time decides.
    assert rig.agent_status()["sent_bytes"] - sent_before < ballast_bytes
    numbers = [point.bookmark.stamp.number for point in rig.positions()]
    assert max(numbers) > committed + 5


def _committed(rig: Rig) -> int:
    return int(str(rig.agent_status().get("committed", "0.0")).rpartition(".")[2])

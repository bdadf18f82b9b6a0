"""Readers see whole points or none, whatever becomes of the applier meanwhile."""

import random
import threading
import time

import pytest

from replication.errors import ReplicationError
from tests.e2e.order import assert_files_hold_prefix, record_files, writing
from tests.e2e.recovered import digest
from tests.e2e.rig import Rig

_MIB = 1 << 20
POINTS_CHECKED_MAX = 20


class ExportLoop(threading.Thread):
    """Reads every block of the newest point again and again, and older ones once more."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(name="export loop")
        self._rig = rig
        self._done = threading.Event()
        self._chance = random.Random(2)
        self.digests: dict[int, list[str]] = {}
        self.reads = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._done.is_set():
                self._read(self._rig.points()[-1].position)
                self._read(self._chance.choice(list(self.digests)))
        except (ReplicationError, AssertionError, OSError) as error:
            self.error = error

    def _read(self, position: int) -> None:
        found = [digest(self._rig.reader(), position, disk.index) for disk in self._rig.disks]
        before = self.digests.setdefault(position, found)
        assert found == before, f"position {position} has changed since it was read first"
        self.reads += 1

    def finish(self) -> None:
        self._done.set()
        self.join()
        if self.error is not None:
            raise self.error


def test_exports_are_whole_while_the_applier_is_killed(rig: Rig) -> None:
    check_exports(rig, kills=4)


@pytest.mark.soak
def test_exports_are_whole_while_the_applier_is_killed_for_long(rig: Rig) -> None:
    check_exports(rig, kills=60)


def check_exports(rig: Rig, *, kills: int) -> None:
    disks = [rig.add_disk(256 * _MIB, "ext4", in_memory=True) for _ in range(2)]
    # An applier that is hardly ever up must not fall ever further behind.
    rig.settings["agent"] = {"capture": {"interval_seconds": 2.0}}
    rig.start()
    before = rig.wait_for_point().position
    chance = random.Random(1)
    loop = ExportLoop(rig)
    with writing("files", *record_files(disks)):
        loop.start()
        try:
            for _ in range(kills):
                time.sleep(chance.uniform(0.1, 1.0))
                rig.kill(rig.applier)
                rig.applier.start()
            rig.wait_for_point(120 + 3 * kills)
        finally:
            loop.finish()
    points = {point.position: point for point in rig.points()}
    made = max(points) - before
    assert loop.reads > kills
    assert len(loop.digests) >= max(2, made / 2), "half of what was the newest for a while"
    chosen = sorted(chance.sample(list(loop.digests), min(POINTS_CHECKED_MAX, len(loop.digests))))
    for position in chosen:
        assert_files_hold_prefix(rig, points[position], rig.scratch())

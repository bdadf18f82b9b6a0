"""The file below a disk cannot be read any more, as when the applier restarts, and comes back."""

# ruff: noqa: ASYNC221 - nothing else runs on this loop

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from azure_emu.compute.evidence import read_end
from azure_emu.compute.launch import CONSOLE
from replication.control.recovery import VmPower, VmState
from tests.azure_emu.compute.site import MIB, Place, running

pytestmark = pytest.mark.timeout(900)
"""Emulated guests beside other tests take their time."""

SCRIPT = """
[ -e /mnt/disk0/was-here ] && exec echo "the overlay is kept"
touch /mnt/disk0/was-here
sync
echo marked >/dev/ttyS0
while :; do
    echo 3 >/proc/sys/vm/drop_caches
    cat /dev/vda >/dev/null
done
"""


class Mount:
    def __init__(self, source: Path, mount: Path) -> None:
        self._source, self._mount = source, mount
        self._process: subprocess.Popen[bytes] | None = None

    def appear(self) -> None:
        command = [sys.executable, "-m", "tests.azure_emu.compute.vanishing_point"]
        self._process = subprocess.Popen([*command, str(self._source), str(self._mount)])
        deadline = time.monotonic() + 60
        while not self._mount.is_mount():
            assert self._process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def vanish(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def clear(self) -> None:
        self.vanish()
        subprocess.run(["umount", "-l", self._mount], check=False, capture_output=True)


@pytest.fixture
def mount(place: Place) -> Iterator[Mount]:
    source = place.folder / "source"
    source.mkdir()
    mount = Mount(source, place.points)
    try:
        yield mount
    finally:
        mount.clear()


async def test_a_point_that_vanishes_is_a_power_failure_and_no_more(
    place: Place, mount: Mount
) -> None:
    image = place.folder / "source" / "disk0"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    mount.appear()
    order = place.order(
        place.point("disk0", 64 * MIB), power=VmPower.ON, script=SCRIPT, check_seconds_max=200
    )
    async with running(place) as site:
        await site.order(order)
        console = str(place.vm_folder(order.id) / CONSOLE)
        await site.until(order.id, lambda _: b"marked" in read_end(console, MIB))
        (process,) = place.processes(order.id)
        mount.vanish()
        report = await site.until(order.id, lambda one: not place.processes(order.id))
        assert report.state is VmState.STARTING
        report = await site.until(order.id, lambda one: "cannot read" in one.reason)
        assert report.check is None
        mount.clear()
        mount.appear()
        report = await site.until(order.id, lambda one: one.check is not None)
        assert report.check is not None
        assert report.check.passed, report
        assert report.check.output == "the overlay is kept"
        assert place.processes(order.id) not in ([], [process])
        await site.order(removed=(order.id,))
        await site.until_removed(order.id)

"""The file below a disk cannot be read any more, as when the applier restarts, and comes back."""

# ruff: noqa: ASYNC221 - nothing else runs on this loop

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from azure_emu.compute.carry_out import RETRY_SECONDS
from azure_emu.compute.evidence import read_end
from azure_emu.compute.launch import CONSOLE
from azure_emu.compute.monitor import Monitor
from replication.control.recovery import VmPower, VmState
from tests.azure_emu.compute.site import MIB, Place, running
from tests.azure_emu.compute.test_node import own_disk

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


async def test_a_copy_that_fails_is_told_and_tried_again_in_peace(
    place: Place, mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Place(place.folder / "other")
    disk = own_disk(source, b"\r\nweb-01 login: ")
    shutil.copy(source.points / "disk0", place.folder / "source" / "disk0")
    mount.appear()
    begun: list[float] = []
    begin = Monitor.start_stream

    async def counted(monitor: Monitor, node: str) -> None:
        begun.append(time.monotonic())
        await begin(monitor, node)

    monkeypatch.setattr(Monitor, "start_stream", counted)
    order = place.order(disk, power=VmPower.ON)
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda one: one.state is VmState.UP)
        mount.vanish()
        await site.order(order.model_copy(update={"independent": True}))
        report = await site.until(order.id, lambda one: "disk0 is not copied" in one.reason)
        assert not report.independent
        await site.until(order.id, lambda _: len(begun) >= 3)
        assert begun[-1] - begun[0] > (len(begun) - 1) * RETRY_SECONDS
        await site.order(removed=(order.id,))
        await site.until_removed(order.id)

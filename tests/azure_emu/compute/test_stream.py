"""Disks copied while their VM runs: once one is said to stand alone, nothing can take that back."""

# ruff: noqa: ASYNC221 - nothing else runs on this loop

import asyncio
import random
import subprocess
import uuid
from pathlib import Path

import pytest

from azure_emu.compute.disk import disks_of, needs_source
from azure_emu.compute.guest.build import KERNEL
from azure_emu.compute.monitor import Monitor
from azure_emu.compute.process import kill
from replication.control.recovery import VmPower, VmState
from replication.errors import UnavailableError
from tests.azure_emu.compute.site import MIB, SECONDS_MAX, Place, files_of, running
from tests.azure_emu.compute.test_node import own_disk

pytestmark = pytest.mark.timeout(900)
"""Emulated guests beside other tests take their time."""


async def test_a_copied_disk_has_all_of_its_point_when_qemu_is_killed(place: Place) -> None:
    disks = [own_disk(place, b"\r\nweb-01 login: "), place.point("disk1", 64 * MIB)]
    with (place.points / "disk1").open("r+b") as file:
        file.write(random.Random(1).randbytes(24 * MIB))
    order = place.order(*disks, power=VmPower.ON)
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda one: one.state is VmState.UP)
        await site.until(order.id, lambda _: len(site.evidence) == 2)
        (process,) = place.processes(order.id)
        points = {str(place.points / disk.source) for disk in disks}
        assert points <= files_of(process)

    # The daemon is away when a copy has come to its end.
    monitor = await Monitor.connect(str(place.vm_folder(order.id)))
    await reaches_nothing_else(place, order.id, monitor)
    await monitor.start_stream("disk1")
    async with asyncio.timeout(SECONDS_MAX):
        while (await monitor.streams())[0].state != "pending":  # noqa: ASYNC110 - QEMU
            await asyncio.sleep(0.02)
    await monitor.close()
    (copied,) = disks_of(str(place.vm_folder(order.id)), str(place.points), disks[1:])
    assert await needs_source(copied)  # its tables are in QEMU's memory alone

    async with running(place) as site:
        await site.order(order.model_copy(update={"independent": True}))
        await site.until(order.id, lambda one: one.independent)
        assert not points & files_of(process)  # nothing holds up that they go
        (process,) = place.processes(order.id)
        await kill(process)
    for disk in disks:
        image = place.vm_folder(order.id) / f"{disk.source}.qcow2"
        told = subprocess.run(["qemu-img", "info", "-U", image], check=True, capture_output=True)
        assert b"backing file" not in told.stdout
        point = place.points / disk.source
        compare = ["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "raw"]
        subprocess.run([*compare, image, point], check=True, capture_output=True)


async def test_a_disk_with_snapshots_is_not_copied_while_its_vm_runs_and_says_why(
    place: Place,
) -> None:
    """What a snapshot stands on would stay with the point, and go with it."""
    order = place.order(own_disk(place, b"\r\nweb-01 login: "))
    image = place.vm_folder(order.id) / "disk0.qcow2"
    on = order.model_copy(update={"power": VmPower.ON})
    async with running(place) as site:
        await site.order(order)
        await site.until(order.id, lambda one: one.state is VmState.DISKS_READY)
        snapshot = ["qemu-img", "snapshot", "-q"]
        subprocess.run([*snapshot, "-c", "before", image], check=True)
        await site.order(on)
        await site.until(order.id, lambda one: one.state is VmState.UP)
        await site.until(order.id, lambda _: len(site.evidence) == 2)
        await site.order(on.model_copy(update={"independent": True}))
        report = await site.until(order.id, lambda one: "keeps snapshots" in one.reason)
        assert (report.state, report.independent) == (VmState.UP, False)
        assert "delete-snapshot" in report.reason
        told = subprocess.run(["qemu-img", "info", "-U", image], check=True, capture_output=True)
        assert b"backing file" in told.stdout
        # As it says: off, deleted, and then it stands alone.
        await site.order(order.model_copy(update={"power": VmPower.OFF}))
        await site.until(order.id, lambda one: one.state is VmState.STOPPED)
        subprocess.run([*snapshot, "-d", "before", image], check=True)
        off = {"power": VmPower.OFF, "independent": True}
        await site.order(order.model_copy(update=off))
        report = await site.until(order.id, lambda one: one.independent)
        assert report.reason == ""


async def reaches_nothing_else(place: Place, vm: uuid.UUID, monitor: Monitor) -> None:
    """QEMU does what its monitor says, as whoever broke out would, and cannot."""
    (place.points / "other").write_bytes(bytes(512))
    (place.data / "vms/other").mkdir()
    (place.data / "vms/other/disk0.qcow2").write_bytes(bytes(512))
    own, guest = place.vm_folder(vm), Path(place.config.guest_folder)
    for path in (
        *("/etc/shadow", "/etc/passwd", "/proc/1/environ", "vm.json", own / "vm.json"),
        *(place.points / "other", place.points / "disk1", place.data / "vms/other/disk0.qcow2"),
    ):
        asked = {"driver": "file", "node-name": "x", "filename": str(path), "read-only": True}
        with pytest.raises(UnavailableError, match="Permission denied"):
            await monitor._ask("blockdev-add", asked)
    for path in (own / "new", "vm.json", place.points / "disk1", guest / KERNEL, "/tmp/new"):
        with pytest.raises(UnavailableError, match=r"Permission denied|not permitted"):
            await monitor._ask("screendump", {"filename": str(path)})
    assert not (own / "new").exists()
    (place.data / "vms/other/disk0.qcow2").unlink()
    (place.data / "vms/other").rmdir()

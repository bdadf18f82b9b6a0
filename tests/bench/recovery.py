"""From a recovery point to a disk that can be written, and to a machine that has answered."""

import asyncio
import statistics
import subprocess
import time
import uuid
from pathlib import Path

from azure_emu.compute import disk
from azure_emu.compute.disk import disks_of
from replication.control.recovery import SourceDisk, VmPower
from tests.azure_emu.compute.site import Place as Site
from tests.azure_emu.compute.site import running
from tests.bench.figure import AtMost, Row, percentile, spread
from tests.bench.place import GIB, MIB, Place
from tests.deploy.small_site import SmallSite, ended, plan_of, small_site
from vsphere_emu.image.builder import cache_folder, copy_image, default_recipe, ensure_image

PLAN_MACHINES = 10
SIZES = (GIB, 4 * GIB, 16 * GIB, 64 * GIB, 256 * GIB)


def measure_disks(where: Place) -> list[Row]:
    """Disks: from a point's file to a disk whose last sector has been written."""
    seconds = [
        _attached_seconds(where.folder / uuid.uuid4().hex, SIZES[number % len(SIZES)])
        for number in range(10 if where.quick else 50)
    ]
    return [
        Row(
            figure="a point to a disk that is written to, p99",
            unit="s",
            target=AtMost(1.0),
            measured=percentile(seconds, 0.99),
            limit=min(seconds),
            limit_is="the quickest of them",
            note=f"{len(seconds)} disks of 1 to 256 GiB, sparse; {spread(seconds)}",
        )
    ]


def _attached_seconds(folder: Path, size_bytes: int) -> float:
    points = folder / "points"
    points.mkdir(parents=True)
    with (points / "disk0").open("wb") as file:
        file.truncate(size_bytes)
    ordered = SourceDisk(index=0, name="d", size_bytes=size_bytes, source="disk0")
    began = time.monotonic()
    (made,) = disks_of(str(folder / "vm"), str(points), [ordered])
    asyncio.run(disk.make_disks([made]))
    last = made.size_bytes - 512
    command = ["qemu-io", "-f", "qcow2", "-c", f"write -P 1 {last} 512", made.path]
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - began


def measure_boots(where: Place) -> list[Row]:
    """RTO: from an order to the answer of the recovery guest, by emulation."""
    seconds = []
    for number in range(2 if where.quick else 10):
        where.rest()
        seconds.append(asyncio.run(_answer_seconds(where.folder / f"site{number}")))
    return [
        Row(
            figure="an order to the recovery guest's answer, longest",
            unit="s",
            target=AtMost(15.0),
            measured=max(seconds),
            limit=min(seconds),
            limit_is="the quickest of them",
            note=f"{len(seconds)} boots with ext4 of 1 GiB, emulated CPU; {spread(seconds)}",
        ),
        _login_row(where),
    ]


def _login_row(where: Place) -> Row:
    image = ensure_image(default_recipe(), cache_folder())
    seconds = []
    for number in range(1 if where.quick else 5):
        where.rest()
        folder = where.folder / f"login{number}"
        seconds.append(asyncio.run(_answer_seconds(folder, image)))
    return Row(
        figure="an order to a Debian's login prompt, longest",
        unit="s",
        target=AtMost(60.0),
        measured=max(seconds),
        limit=min(seconds),
        limit_is="the quickest of them",
        note=f"{len(seconds)} boots of the lab's own image, emulated CPU; {spread(seconds)}",
    )


async def _answer_seconds(folder: Path, image: str = "") -> float:
    """Until the check is done. image: what disk 0 holds; else it has an empty file system."""
    site = Site(folder)
    try:
        path = site.points / "disk0"
        if image:
            await asyncio.to_thread(copy_image, image, str(path))
            point = site.point("disk0", path.stat().st_size)
        else:
            point = site.point("disk0", 1024 * MIB)
            made = ["mkfs.ext4", "-q", "-F", str(path)]
            await asyncio.to_thread(subprocess.run, made, check=True)
        order = site.order(point, power=VmPower.ON)
        async with running(site) as node:
            began = time.monotonic()
            await node.order(order)
            report = await node.until(order.id, lambda one: one.check is not None)
            seconds = time.monotonic() - began
            assert report.check is not None
            assert report.check.passed, report.check
            await node.order(removed=(order.id,))
            await node.until_removed(order.id)
        return seconds
    finally:
        await site.clear()


def measure_plan(where: Place) -> list[Row]:
    """A test failover of 10 machines by a plan, to that of one of them."""
    count = 3 if where.quick else PLAN_MACHINES
    names = tuple(f"guest-{number:02}" for number in range(count))
    one, all_of_them = [], []
    with small_site(where.folder, names, busy=False) as site:
        for number in range(1 if where.quick else 3):
            where.rest()
            one.append(_plan_seconds(site, f"one-{number}", names[:1]))
            where.rest()
            all_of_them.append(_plan_seconds(site, f"all-{number}", names))
    ratios = [many / single for many, single in zip(all_of_them, one, strict=True)]
    return [
        Row(
            figure=f"test failover of {count} machines by a plan, to that of one",
            unit="times",
            target=AtMost(6.0),
            measured=statistics.median(ratios),
            limit=float(count),
            limit_is="one after the other",
            note=f"{spread(ratios)}; one {spread(one)} s, {count} together {spread(all_of_them)} s "
            "to the last one's check, two boot at once",
        )
    ]


def _plan_seconds(site: SmallSite, plan: str, names: tuple[str, ...]) -> float:
    """From the order to the end of the job: all are up and have been checked."""
    with site.operator() as api:
        api.post("/plans", plan_of(plan, names))
        began = time.monotonic()
        ended(api, api.post(f"/plans/{plan}/runs", {"kind": "test"})["id"])
        seconds = time.monotonic() - began
        (run,) = api.items(f"/plans/{plan}/runs")
        up = api.get(f"/runs/{run['id']}")["failovers"]
        assert [each["state"] for each in up] == ["up"] * len(names), up
        ended(api, api.post(f"/runs/{run['id']}/cleanup", {"notes": ""})["id"])
    return seconds

"""An applier that a config server tells which points stay."""

import asyncio
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from appliance.applier.store import MachineStore, ReaderStore, machines_in
from appliance.applier.store.holds import read_holds
from daemon.assignment_memory import HEALTH_PART
from replication.bookmark import Consistency, Stamp
from replication.control.memory import RESTORED_STEP
from replication.control.recovery import Hold, PointChoice
from tests.appliance.applier.controlled import (
    NODE,
    held_of,
    known,
    mounted,
    named,
    store_of,
    told,
    until,
)
from tests.appliance.applier.running import ApplierProcess, Site
from tests.appliance.applier.source import Changeset, Source, a_source
from tests.appliance.applier.test_process import health_of
from tests.appliance.orders import Orders

LATEST_ALONE: dict[str, Any] = {"retention_seconds": 0}


def a_hold(source: Source, choice: str, number: int = 0, *, until_ns: int = 0) -> Hold:
    return Hold(
        id=uuid.uuid4(),
        machine=source.machine,
        choice=choice,
        generation=int(number > 0),
        number=number,
        until_ns=until_ns,
    )


async def put(
    site: Site, source: Source, consistency: Consistency = Consistency.CRASH
) -> Changeset:
    """One more changeset in the cache."""
    source.scribble()
    made = source.changeset(consistency=consistency)
    await made.put(site.account)
    return made


def numbers(site: Site, source: Source) -> list[int]:
    """Changesets whose points there are."""
    points = ReaderStore(str(site.store), source.machine).points()
    return [point.bookmark.stamp.number for point in points]


def state_of(orders: Orders, hold: Hold) -> str:
    return str(held_of(orders, hold).get("state"))


async def image_of(site: Site, report: dict[str, Any]) -> bytes:
    """Of the held point's first disk, where the report says that it is."""
    points = site.folder / "points"
    await until(lambda: os.path.ismount(points))
    disk = report["disks"][0]["index"]
    path = points / report["folder"] / report["point"] / f"disk{disk}.img"
    return await asyncio.to_thread(path.read_bytes)


def listed(orders: Orders, source: Source) -> list[dict[str, Any]]:
    """The newest list of points that the config server was told."""
    found: list[dict[str, Any]] = orders.points.get(source.machine, {}).get("points", [])
    return found


async def test_each_hold_is_carried_out_and_outlives_a_kill(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess]
) -> None:
    source, stranger = a_source(1 << 20), a_source(1 << 20, seed=2)
    known(orders, source)
    kinds = (Consistency.CRASH, Consistency.APP, Consistency.CRASH)
    _, app, third = [await put(site, source, kind) for kind in kinds]
    processed = a_hold(source, PointChoice.LATEST_PROCESSED)
    consistent = a_hold(source, PointChoice.LATEST_APP_CONSISTENT)
    latest = a_hold(source, PointChoice.LATEST, 4)
    nowhere = a_hold(source, "1999-01-01T00:00:00Z-00000001")
    unknown, keyless = (
        Hold(id=uuid.uuid4(), machine=one, choice="latest")
        for one in (uuid.uuid4(), stranger.machine)
    )
    machines = (named(source, "web"), named(stranger, "other"))
    with mounted(spawn(), site):
        await orders.assign(NODE, told(1, *machines))
        await site.until_applied(source, Stamp(1, 3))
        wanted = (processed, consistent, latest, nowhere, unknown, keyless)
        await orders.assign(NODE, told(2, *machines, holds=wanted))
        await until(lambda: state_of(orders, processed) == "held")
        await until(lambda: state_of(orders, nowhere) == "refused")
        reports = {hold.id: held_of(orders, hold) for hold in wanted}
        assert [reports[hold.id]["state"] for hold in wanted] == [
            *("held", "held", "waiting", "refused", "refused", "waiting"),
        ]
        assert reports[latest.id]["reason"] == "changeset 1.3 is applied, 1.4 or newer is awaited"
        assert "there is no point 1999" in reports[nowhere.id]["reason"]
        assert "has no machine" in reports[unknown.id]["reason"]
        assert "data key" in reports[keyless.id]["reason"]
        for hold, changeset in ((processed, third), (consistent, app)):
            report = reports[hold.id]
            bookmark = changeset.manifest.bookmark
            assert (report["number"], report["time_ns"], report["consistency"]) == (
                bookmark.stamp.number,
                bookmark.time_ns,
                bookmark.consistency.value,
            )
            assert await image_of(site, report) == changeset.images[0]

        # Half of the next one comes, then its manifest, then what was missing.
        source.scribble()
        fourth = source.changeset()
        assert len(fourth.segments) > 0
        parts = [fourth.segment_name(0), fourth.manifest_name]
        await fourth.put(site.account, without=parts)
        await asyncio.sleep(0.3)
        await fourth.put(site.account, without=parts[:1])
        await until(lambda: "waiting for 1 blobs" in str(orders.reports[NODE]["troubles"]))
        assert state_of(orders, latest) == "waiting"
        await fourth.put(site.account)
        await until(lambda: state_of(orders, latest) == "held")
        assert held_of(orders, latest)["number"] == 4
        assert await image_of(site, held_of(orders, latest)) == fourth.images[0]

        # Whatever is thinned, and whatever people call it.
        await put(site, source)
        await site.until_applied(source, Stamp(1, 5))
        renamed = named(source, "www", **LATEST_ALONE)
        await orders.assign(NODE, told(3, renamed, holds=(consistent, latest)))
        await until(lambda: numbers(site, source) == [2, 4, 5])
        assert await image_of(site, reports[consistent.id]) == app.images[0]
    await orders.leave()
    with mounted(spawn(), site):
        await put(site, source)
        await put(site, source)
        await site.until_applied(source, Stamp(1, 7))
        orders.reports.clear()
        await orders.come_back()
        await until(lambda: state_of(orders, consistent) == "held")
        assert held_of(orders, consistent) == reports[consistent.id]
        await orders.assign(NODE, told(4, renamed))
        await until(lambda: numbers(site, source) == [7])
        assert read_holds(ReaderStore(str(site.store), source.machine).folder) == ()


async def test_an_older_memory_ends_no_hold_until_it_is_confirmed(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess], health_port: int
) -> None:
    source = a_source(1 << 20)
    known(orders, source)
    await put(site, source)
    hold = a_hold(source, PointChoice.LATEST_PROCESSED)
    machine = named(source, "web", **LATEST_ALONE)
    folder = ReaderStore(str(site.store), source.machine).folder
    with mounted(spawn(), site):
        await orders.assign(NODE, told(10, machine, holds=(hold,)))
        await until(lambda: state_of(orders, hold) == "held")
        await orders.assign(NODE, told(3, machine))
        await until(lambda: orders.reports[NODE]["assignment"] == 3)
        assert state_of(orders, hold) == "held"
    (site.folder / "identity" / "assignment.json").unlink()  # it knows no more what was named
    with mounted(spawn(), site):
        await until(lambda: HEALTH_PART in health_of(health_port).get("warnings", {}))
        await put(site, source)
        await put(site, source)
        await until(lambda: [one["held"] for one in listed(orders, source)] == [True, False, False])
        assert [held.id for held in read_holds(folder)] == [hold.id]
        await orders.assign(NODE, told(11 + RESTORED_STEP, machine))
        await until(lambda: numbers(site, source) == [3])
        assert read_holds(folder) == ()


async def test_a_lock_outlives_who_asked_for_it_and_what_would_remove_its_machine(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess], health_port: int
) -> None:
    source = a_source(1 << 20)
    known(orders, source)
    await put(site, source)
    until_ns = time.time_ns() + 3600 * 10**9
    lock = a_hold(source, PointChoice.LATEST_PROCESSED, until_ns=until_ns)
    machine = named(source, "web", **LATEST_ALONE)

    with mounted(spawn(), site):
        orders.takes_points = False
        await orders.assign(NODE, told(1, machine, holds=(lock,)))
        await until(lambda: state_of(orders, lock) == "held")
        assert orders.lists == 0
        orders.takes_points = True
        await until(
            lambda: [one["locked_until_ns"] for one in listed(orders, source)] == [until_ns]
        )
        assert orders.points[source.machine]["space_bytes"] > 1 << 19
        name = held_of(orders, lock)["point"]
        assert [(one["name"], one["held"]) for one in listed(orders, source)] == [(name, False)]
        await asyncio.sleep(0.5)
        assert orders.lists == 1  # nothing has changed

        # Named with an earlier time, then not at all.
        earlier = lock.model_copy(update={"until_ns": 1})
        await orders.assign(NODE, told(2, machine, holds=(earlier,)))
        await put(site, source)
        await until(lambda: len(listed(orders, source)) == 2)
        await orders.assign(NODE, told(3, machine))
        await put(site, source)
        await put(site, source)
        await until(lambda: len(listed(orders, source)) == 4)
        assert listed(orders, source)[0]["locked_until_ns"] == until_ns

        # The points are to be removed.
        part = f"removal of {source.machine}"
        await orders.assign(NODE, told(4, removed=(source.machine,)))
        await until(lambda: part in health_of(health_port)["warnings"])
        assert "one is locked until" in health_of(health_port)["warnings"][part]
        await until(lambda: part in [one["part"] for one in orders.reports[NODE]["troubles"]])
        assert store_of(orders, source)["removed"] is False
        assert store_of(orders, source)["point_count"] == len(numbers(site, source))
        assert machines_in(str(site.store)) == [source.machine]
        await orders.assign(NODE, told(5, machine))
        await until(lambda: part not in health_of(health_port)["warnings"])
        await orders.assign(NODE, told(6, removed=(source.machine,)))
        await until(lambda: part in health_of(health_port)["warnings"])
    shorten(site, source)
    with mounted(spawn(), site):
        await until(lambda: store_of(orders, source).get("removed"))
        assert machines_in(str(site.store)) == []


def shorten(site: Site, source: Source) -> None:
    """As if the hour had passed: the lock is written down anew with a time in the past."""
    with MachineStore.open(str(site.store), source.machine) as store:
        store.holds.replace([replace(held, until_ns=1) for held in store.holds.holds])


async def test_the_first_point_is_told_at_once_and_others_when_it_is_time(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess]
) -> None:
    source = a_source(1 << 20)
    known(orders, source)
    process = spawn()
    config = site.folder / "controlled.toml"
    config.write_text(config.read_text().replace("points_seconds = 0.2", "points_seconds = 3600"))
    with mounted(process, site):
        await orders.assign(NODE, told(1, named(source, "web")))
        await until(lambda: store_of(orders, source))
        await put(site, source)
        await until(lambda: len(listed(orders, source)) == 1)
        await put(site, source)
        await site.until_applied(source, Stamp(1, 2))
        await asyncio.sleep(4)
        assert len(listed(orders, source)) == 1

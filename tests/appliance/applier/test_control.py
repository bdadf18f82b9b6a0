"""An applier that a config server tells whose points it keeps."""

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.applier.control import RETRY_SECONDS, policy_of
from appliance.applier.removal import REMOVED_PREFIX, finish_removals, remove_store
from appliance.applier.retention import RetentionPolicy
from appliance.applier.store import ReaderStore, machines_in
from daemon.assignment_memory import HEALTH_PART
from daemon.folder_lock import FolderLock
from replication.bookmark import Stamp
from replication.cache_layout import machine_prefix
from replication.control.assignment import AppliedMachine
from replication.control.memory import RESTORED_STEP
from replication.errors import UnavailableError
from tests.appliance.applier.controlled import (
    NODE,
    known,
    mounted,
    named,
    store_of,
    told,
    until,
)
from tests.appliance.applier.running import WAIT_SECONDS_MAX, ApplierProcess, Site
from tests.appliance.applier.source import a_source
from tests.appliance.applier.store.test_crash import kill_before
from tests.appliance.applier.test_process import health_of
from tests.appliance.orders import Orders


async def test_machines_come_change_and_go_while_it_runs(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess]
) -> None:
    web, db = a_source(8 << 20, seed=1), a_source(1 << 20, seed=2)
    known(orders, web, db)
    points = site.folder / "points"
    first = web.changeset()
    await first.put(site.account)
    with mounted(spawn(), site):
        await orders.assign(NODE, told(1, named(web, "web")))
        await site.until_applied(web, Stamp(1, 1))
        key = site.folder / "identity" / "data-keys" / f"{web.machine}.key"
        assert key.stat().st_mode & 0o777 == 0o600
        assert orders.asked == [(NODE, web.machine)]
        await until(lambda: points.is_dir() and os.listdir(points) == ["web"])
        await until(lambda: store_of(orders, web).get("point_count") == 1)
        report = store_of(orders, web)
        assert (report["generation"], report["applied"], report["removed"]) == (1, 1, False)
        assert report["oldest_ns"] == report["newest_ns"] == first.manifest.bookmark.time_ns
        assert report["space_bytes"] > 1 << 19
        assert orders.reports[NODE]["free_bytes"] > 0

        # Another one comes, the first one gets another name, and nothing is mounted anew.
        await db.changeset().put(site.account)
        await orders.assign(NODE, told(2, named(web, "www"), named(db, "db")))
        await site.until_applied(db, Stamp(1, 1))
        await until(lambda: sorted(os.listdir(points)) == ["db", "www"])
        assert ReaderStore(str(site.store), web.machine).name == "www"

        # One is to wait, and the other goes on.
        await orders.assign(NODE, told(3, named(web, "www", apply=False), named(db, "db")))
        await until(lambda: orders.reports[NODE]["assignment"] == 3)
        web.scribble()
        second = web.changeset()
        await second.put(site.account)
        db.scribble()
        await db.changeset().put(site.account)
        await site.until_applied(db, Stamp(1, 2))
        assert (await site.watermark(web)).applied == Stamp(1, 1)
        await orders.assign(NODE, told(4, named(web, "www"), named(db, "db")))
        await site.until_applied(web, Stamp(1, 2))
        site.check(web, first, second)

        # Retention of nothing but the newest.
        await orders.assign(NODE, told(5, named(web, "www", retention_seconds=0), named(db, "db")))
        await until(lambda: store_of(orders, web).get("point_count") == 1)
        assert store_of(orders, db)["point_count"] == 2

        # Not named any more is not removed.
        await orders.assign(NODE, told(6, named(db, "db")))
        await until(lambda: not store_of(orders, web))
        assert web.machine in machines_in(str(site.store))

        # Somebody reads when it is removed.
        image = points / "www" / "latest" / "disk0.img"
        with image.open("rb") as reading:
            assert len(reading.read(4096)) == 4096
            await orders.assign(NODE, told(7, named(db, "db"), removed=(web.machine,)))
            await until(lambda: store_of(orders, web).get("removed"))
            assert machines_in(str(site.store)) == [db.machine]
            assert not key.exists()
            await until(lambda: os.listdir(points) == ["db"])
            await until(lambda: not open_files_below(site.store, str(web.machine)))
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(reading.fileno(), 4096, 7 << 20)
        assert sorted(os.listdir(site.store / "machines")) == [str(db.machine)]
        db.scribble()
        await db.changeset().put(site.account)
        await site.until_applied(db, Stamp(1, 3))


def open_files_below(store: Path, part: str) -> list[str]:
    """Files of a machine that some process has open, deleted ones too."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            target = os.readlink(link)
            if target.startswith(str(store)) and part in target:
                found.append(target)
    return found


async def test_streams_go_on_without_the_config_server_also_after_a_restart(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess], health_port: int
) -> None:
    source, stranger = a_source(1 << 20), a_source(1 << 20, seed=3)
    known(orders, source)
    changesets = [source.changeset()]
    await changesets[0].put(site.account)
    await orders.assign(NODE, told(1, named(source, "web"), named(stranger, "other")))
    with mounted(spawn(), site):
        await site.until_applied(source, Stamp(1, 1))
        await until(lambda: "data key of other" in str(health_of(health_port)))
        await orders.leave()
        source.scribble()
        changesets.append(source.changeset())
        await changesets[1].put(site.account)
        await site.until_applied(source, Stamp(1, 2))
        await until(lambda: "config server" in health_of(health_port).get("warnings", {}))
    with mounted(spawn(), site):
        source.scribble()
        changesets.append(source.changeset())
        await changesets[2].put(site.account)
        began = time.monotonic()
        await site.until_applied(source, Stamp(1, 3))
        assert time.monotonic() - began < 30  # it does not wait for the key that cannot be had
        known(orders, stranger)
        await orders.come_back()
        await stranger.changeset().put(site.account)
        await site.until_applied(stranger, Stamp(1, 1))
        await until(lambda: health_of(health_port).get("warnings") == {})
    site.check(source, *changesets)


async def test_a_key_that_changed_is_fetched_again_once_and_taken_if_it_opens_what_waits(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess], health_port: int
) -> None:
    source, wrong = a_source(1 << 20), bytes(32)
    orders.data_keys[source.machine] = wrong
    key = site.folder / "identity" / "data-keys" / f"{source.machine}.key"
    with mounted(spawn(), site):
        await orders.assign(NODE, told(1, named(source, "web")))
        await until(key.exists)
        await source.changeset().put(site.account)
        await until(lambda: len(orders.asked) == 2)  # what is forged looks the same
        await asyncio.sleep(RETRY_SECONDS + 1)
        assert len(orders.asked) == 2
        assert "is not the data key" in str(health_of(health_port))
        orders.data_keys[source.machine] = bytes([1]) * 32  # a wrong one takes no other's place
        await orders.assign(NODE, told(2, named(source, "web")))
        await until(lambda: len(orders.asked) == 3)
        known(orders, source)
        await orders.assign(NODE, told(3, named(source, "web")))
        await site.until_applied(source, Stamp(1, 1))
        assert len(orders.asked) == 4
        assert key.read_text().strip() == source.data_key.hex()
        orders.data_keys[source.machine] = wrong
        await orders.assign(NODE, told(4, named(source, "web")))
        source.scribble()
        await source.changeset().put(site.account)
        await site.until_applied(source, Stamp(1, 2))
        assert len(orders.asked) == 4


async def test_an_older_memory_removes_nothing_until_it_is_confirmed(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess], health_port: int
) -> None:
    source = a_source(1 << 20)
    known(orders, source)
    await source.changeset().put(site.account)
    with mounted(spawn(), site):
        await orders.assign(NODE, told(10, named(source, "web")))
        await site.until_applied(source, Stamp(1, 1))
    with mounted(spawn(), site):
        for version in (3, 11):
            await orders.assign(NODE, told(version, removed=(source.machine,)))
            await until(lambda: orders.reports[NODE]["assignment"] == version)  # noqa: B023
            assert machines_in(str(site.store)) == [source.machine]
            assert "restored" in health_of(health_port)["warnings"][HEALTH_PART]
    with mounted(spawn(), site):
        await until(lambda: HEALTH_PART in health_of(health_port).get("warnings", {}))
        assert machines_in(str(site.store)) == [source.machine]
        await orders.assign(NODE, told(11 + RESTORED_STEP, removed=(source.machine,)))
        await until(lambda: store_of(orders, source).get("removed"))
        assert machines_in(str(site.store)) == []
        await until(lambda: HEALTH_PART not in health_of(health_port).get("warnings", {}))


async def test_what_comes_into_the_cache_after_a_removal_goes_too(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess]
) -> None:
    source = a_source(1 << 20)
    known(orders, source)
    await source.changeset().put(site.account)
    await orders.assign(NODE, told(1, named(source, "web")))

    async def is_empty() -> bool:
        return not await site.account.containers(machine_prefix(source.machine))

    async def until_empty() -> None:
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not await is_empty():
            assert time.monotonic() < deadline, "it stays in the cache"
            await asyncio.sleep(0.05)

    with mounted(spawn(), site):
        await site.until_applied(source, Stamp(1, 1))
        await orders.assign(NODE, told(2, removed=(source.machine,)))
        await until(lambda: store_of(orders, source).get("removed"))
        await source.changeset().put(site.account)  # its process server has not heard yet
        await until_empty()
        await source.changeset().put(site.account)
        await orders.assign(NODE, told(3))
        await until_empty()


async def test_killed_while_it_fetches_a_data_key_it_fetches_it_again(
    site: Site, orders: Orders, spawn: Callable[[], ApplierProcess]
) -> None:
    source = a_source(1 << 20)
    known(orders, source)
    await source.changeset().put(site.account)
    await orders.assign(NODE, told(1, named(source, "web")))
    folder = site.folder / "identity" / "data-keys"
    for seconds in (0.5, 0.02):
        orders.key_seconds = seconds
        orders.asked.clear()
        with mounted(spawn(), site):
            await until(lambda: orders.asked)
            await asyncio.sleep(0.02)
        for left in folder.glob("*.key") if folder.exists() else ():
            assert len(left.read_text().strip()) == 64
    with mounted(spawn(), site):
        await site.until_applied(source, Stamp(1, 1))


def test_killed_anywhere_in_a_removal_it_is_whole_or_goes_on(tmp_path: Path) -> None:
    names = {f"{number:05}" for number in range(100)}
    seen = set()
    for nth in (0, 1, 2, 3, 40, 1000):
        machine = uuid.uuid4()
        folder = tmp_path / "machines" / str(machine) / "layers"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        child = os.fork()
        if child == 0:
            kill_before(nth)
            remove_store(str(tmp_path), machine)
            os._exit(0)
        os.waitpid(child, 0)
        left = [one.name for one in (tmp_path / "machines").iterdir()]
        if str(machine) in left:
            assert set(os.listdir(folder)) == names
            seen.add("whole")
            remove_store(str(tmp_path), machine)
        else:
            assert all(name.startswith(REMOVED_PREFIX) for name in left)
            seen.add("begun" if left else "done")
            finish_removals(str(tmp_path))
        assert os.listdir(tmp_path / "machines") == []
    assert seen == {"whole", "begun", "done"}


def test_store_that_another_process_has_open_is_not_removed(tmp_path: Path) -> None:
    machine = uuid.uuid4()
    folder = tmp_path / "machines" / str(machine)
    folder.mkdir(parents=True)
    with (
        FolderLock(str(folder), UnavailableError("in use")),
        pytest.raises(UnavailableError, match="another applier"),
    ):
        remove_store(str(tmp_path), machine)
    assert folder.is_dir()
    remove_store(str(tmp_path), machine)
    remove_store(str(tmp_path), machine)
    assert not folder.exists()


def test_retention_of_an_assignment_is_taken_to_the_second() -> None:
    base = RetentionPolicy(all_points_seconds=60)
    machine = AppliedMachine(
        id=uuid.uuid4(), name="web", retention_seconds=4 * 3600, crash_frequency_seconds=60
    )
    policy = policy_of(machine, base)
    assert (policy.window_seconds, policy.crash_frequency_seconds) == (4 * 3600, 60)
    assert policy.all_points_seconds == 60
    longest = policy_of(machine.model_copy(update={"retention_seconds": 1 << 40}), base)
    assert longest.window_seconds == 15 * 86400

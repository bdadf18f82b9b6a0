"""Appliers as processes: killed, doubled, without their cache."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from azure.storage.queue.aio import QueueServiceClient

from appliance.applier.azure_account import AzureAccount
from appliance.applier.cache_account import API_VERSION_DEFAULT
from appliance.applier.store import ReaderStore
from replication.bookmark import Stamp
from replication.cache_layout import CONTROL_CONTAINER, WAKE_QUEUE, watermark_name
from replication.errors import ConfigError
from tests.appliance.applier.running import ApplierProcess, Site, until
from tests.appliance.applier.source import Source, a_source
from tests.azure_emu.fixtures import EmulatorProcess, free_ports


@contextlib.contextmanager
def running(process: ApplierProcess) -> Iterator[ApplierProcess]:
    try:
        yield process
    finally:
        process.kill()


def health_of(port: int) -> Any:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)
    except OSError:
        return {}


def metrics_of(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return bytes(answer.read()).decode()


async def test_killed_again_and_again_it_applies_everything_once(site: Site) -> None:
    source = a_source(6 << 20, 1 << 20)
    source.segment_bytes = 512 << 10
    changesets = []
    for _ in range(10):
        changesets.append(source.changeset())
        await changesets[-1].put(site.account)
        source.scribble(60)
    applied, kills, pause = Stamp(0, 0), 0, 0.0
    while applied < Stamp(1, 10):
        with running(site.spawn(source)):
            deadline = time.monotonic() + 30
            while (await site.watermark(source)).applied == applied:
                assert time.monotonic() < deadline, f"nothing after {applied}"
                await asyncio.sleep(0.005)
            pause = (pause + 0.013) % 0.11
            await asyncio.sleep(pause)
        kills += 1
        applied = (await site.watermark(source)).applied
    assert kills >= 2
    assert site.stamps(source) == [changeset.stamp for changeset in changesets]
    site.check(source, *changesets)


async def test_sigterm_in_the_middle_ends_it_soon_and_well(site: Site) -> None:
    source = a_source(24 << 20)
    changeset = source.changeset()
    await changeset.put(site.account)
    with running(site.spawn(source)) as process:
        await until(lambda: b"ready" in process.log.read_bytes())
        started = time.monotonic()
        assert process.stop() == 0
        assert time.monotonic() - started < 10
    with running(site.spawn(source)):
        await site.until_applied(source, Stamp(1, 1))
    site.check(source, changeset)
    assert os.listdir(Path(ReaderStore(str(site.store), source.machine).folder) / "incoming") == []


async def test_second_applier_waits_until_the_first_ends(any_site: Site, tmp_path: Path) -> None:
    source = a_source()
    changesets = [source.changeset()]
    await changesets[0].put(any_site.account)
    (tmp_path / "other").mkdir()
    other = Site(tmp_path / "other", any_site.account, any_site.cache)
    (port,) = free_ports(1)
    with running(any_site.spawn(source)) as first:
        await any_site.until_applied(source, Stamp(1, 1))
        with running(other.spawn(source, service={"health_port": port})):
            await until(lambda: "another applier owns" in str(health_of(port).get("warnings")))
            assert not other.store.joinpath("machines").exists()
            assert first.stop() == 0
            source.scribble()
            changesets.append(source.changeset())
            await changesets[1].put(any_site.account)
            await any_site.until_applied(source, Stamp(1, 2))
            other.check(source, *changesets)
    any_site.check(source, changesets[0])


async def test_two_appliers_never_share_a_store(site: Site) -> None:
    source = a_source()
    await source.changeset().put(site.account)
    (port,) = free_ports(1)
    with running(site.spawn(source)):
        await site.until_applied(source, Stamp(1, 1))
        (site.folder / "elsewhere").mkdir()
        elsewhere = {"folder": str(site.folder / "elsewhere")}
        with running(site.spawn(source, cache=elsewhere, service={"health_port": port})):
            await until(lambda: "in use by another" in str(health_of(port).get("warnings")))


async def test_cache_that_crashes_is_told_the_watermark_again(tmp_path: Path) -> None:
    source = a_source()
    (tmp_path / "azurite").mkdir()
    emulator = EmulatorProcess(tmp_path / "azurite")
    changesets = []
    try:
        emulator.start()
        account = AzureAccount(emulator.connection_string)
        site = Site(tmp_path, account, {"connection_string": emulator.connection_string})
        (port,) = free_ports(1)
        with running(site.spawn(source, service={"health_port": port})):
            changesets.append(source.changeset())
            await changesets[0].put(account)
            await site.until_applied(source, Stamp(1, 1))
            emulator.kill()
            await until(lambda: "does not answer" in str(health_of(port).get("warnings")))
            emulator.start()
            await account.drop(CONTROL_CONTAINER)  # what it had not written out is gone
            await until_watermark(account, source)
            source.scribble()
            changesets.append(source.changeset())
            for changeset in changesets:
                await changeset.put(account)
            await site.until_applied(source, Stamp(1, 2))
            await until(lambda: health_of(port).get("state") == "normal")
        await account.close()
        site.check(source, *changesets)
    finally:
        emulator.kill()


async def until_watermark(account: AzureAccount, source: Source) -> None:
    for _ in range(400):
        if await account.read(CONTROL_CONTAINER, watermark_name(source.machine), 1 << 20):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the watermark is not told again")


async def test_message_wakes_long_before_the_sweep(azure_site: Site) -> None:
    source = a_source()
    connection_string = azure_site.cache["connection_string"]
    async with QueueServiceClient.from_connection_string(
        connection_string, api_version=API_VERSION_DEFAULT
    ) as service:
        queue = service.get_queue_client(WAKE_QUEUE)
        await queue.create_queue()
        try:
            async with azure_site.applier(source, sweep_seconds=600):
                await azure_site.until(source, lambda _: True)
                await asyncio.sleep(0.5)
                changeset = source.changeset()
                await changeset.put(azure_site.account)
                await queue.send_message(str(source.machine))
                await azure_site.until_applied(source, Stamp(1, 1))
        finally:
            await queue.delete_queue()
    azure_site.check(source, changeset)


async def test_memory_stays_bounded_while_a_large_changeset_is_applied(site: Site) -> None:
    source = Source({0: bytearray(os.urandom(1 << 20) * 256)})
    source.segment_bytes = 32 << 20
    await source.changeset(audit=[]).put(site.account)
    with running(site.spawn(source)) as process:
        await site.until_applied(source, Stamp(1, 1))
        assert process.rss_bytes < 200 << 20


async def test_points_are_served_apart_and_end_with_their_applier(site: Site) -> None:
    source = a_source()
    changeset = source.changeset()
    await changeset.put(site.account)
    mount = str(site.folder / "points")
    latest = os.path.join(mount, "web", "latest", "disk0.img")
    try:
        with running(site.spawn(source, points_mount=mount)) as process:
            await site.until_applied(source, Stamp(1, 1))
            await until(lambda: os.path.exists(latest))
            assert content(latest) == changeset.images[0]
            (server,) = children(process.process.pid)
            os.kill(server, signal.SIGKILL)
            await until(lambda: children(process.process.pid) not in ([], [server]))
            await until(lambda: os.path.exists(latest))
            assert content(latest) == changeset.images[0]
        await until(lambda: not os.path.ismount(mount))
    finally:
        unmount(mount)


def unmount(mount: str) -> None:
    """What is left by a test that failed."""
    subprocess.run(["umount", "-l", mount], check=False, capture_output=True)


def content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


async def test_metrics_count_what_was_applied(site: Site) -> None:
    source = a_source()
    await source.changeset().put(site.account)
    (port,) = free_ports(1)
    with running(site.spawn(source, service={"health_port": port})):
        await site.until_applied(source, Stamp(1, 1))
        told = metrics_of(port)
    assert 'understudy_applier_changesets_total{machine="web"} 1.0' in told
    assert 'understudy_applier_lease_held{machine="web"} 1.0' in told


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda key: key.chmod(0o640), "chmod 600"),
        (lambda key: key.write_text("beef"), "holds 2 bytes, not 32"),
        (lambda key: key.unlink(), "cannot read"),
    ],
)
def test_unusable_data_key_file_is_a_config_error(tmp_path: Path, spoil: Any, says: str) -> None:
    source = a_source(4096)
    site = Site(tmp_path, None, {"folder": str(tmp_path)})  # type: ignore[arg-type]
    config = site.toml(source)
    spoil(tmp_path / f"{source.machine}.key")
    ended = subprocess.run(
        [sys.executable, "-m", "appliance.applier", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == ConfigError.exit_code
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr

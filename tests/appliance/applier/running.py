"""An applier that runs: in this process, or as a process of its own that can be killed."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from appliance.applier.__main__ import serve
from appliance.applier.cache_account import CacheAccount
from appliance.applier.config import ApplierConfig
from appliance.applier.store import ReaderStore
from daemon.service import Health, Service
from replication.bookmark import Stamp
from replication.cache_layout import CONTROL_CONTAINER, watermark_name
from replication.watermark import WATERMARK_BYTES_MAX, Watermark
from tests.appliance.applier.source import Changeset, Source

WAIT_SECONDS_MAX = 60.0


class Site:
    """A second site: an account, a store's folder, and the configuration of its applier."""

    def __init__(self, folder: Path, account: CacheAccount, cache: dict[str, Any]) -> None:
        self.folder = folder
        self.account = account
        self.cache = cache
        self.store = folder / "store"
        self._tasks: set[asyncio.Task[None]] = set()

    def tree(self, source: Source, **overrides: Any) -> dict[str, Any]:
        """A configuration, as TOML would give it."""
        key_file = self.folder / f"{source.machine}.key"
        key_file.write_text(source.data_key.hex())
        key_file.chmod(0o600)
        tree: dict[str, Any] = {
            "store": str(self.store),
            "cache": self.cache,
            "machines": [
                {"id": str(source.machine), "name": "web", "data_key_file": str(key_file)}
            ],
            "sweep_seconds": 0.05,
            "wake_seconds": 0.1,
            "reask_seconds": 0.3,
        }
        return tree | overrides

    def toml(self, source: Source, **overrides: Any) -> Path:
        """The same as a file."""
        tree = self.tree(source, **overrides)
        machines = tree.pop("machines")
        tables = {key: tree.pop(key) for key in list(tree) if isinstance(tree[key], dict)}
        lines = [f"{key} = {_toml(value)}" for key, value in tree.items()]
        for name, table in tables.items():
            lines += [f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
        for machine in machines:
            lines += ["[[machines]]", *(f"{key} = {_toml(v)}" for key, v in machine.items())]
        path = self.folder / "applier.toml"
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o600)
        return path

    @contextlib.asynccontextmanager
    async def applier(self, source: Source, **overrides: Any) -> AsyncIterator[Service]:
        """An applier in this process, until the context ends."""
        config = ApplierConfig.model_validate(self.tree(source, **overrides))
        service = Service(asyncio.Event(), Health(), CollectorRegistry())
        task = asyncio.create_task(serve(config, service))
        self._tasks.add(task)
        try:
            yield service
        finally:
            self._tasks.discard(task)
            service.stop.set()
            await asyncio.wait_for(task, WAIT_SECONDS_MAX)

    def spawn(self, source: Source, **overrides: Any) -> "ApplierProcess":
        return ApplierProcess(self.toml(source, **overrides), self.folder / "applier.log")

    async def watermark(self, source: Source) -> Watermark:
        raw = await self.account.read(
            CONTROL_CONTAINER, watermark_name(source.machine), WATERMARK_BYTES_MAX
        )
        return Watermark.from_bytes(raw) if raw else Watermark(source.machine)

    async def until(self, source: Source, says: Callable[[Watermark], bool]) -> Watermark:
        """Wait for a watermark that ``says``."""
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while not says(found := await self.watermark(source)):
            assert time.monotonic() < deadline, f"still {found}"
            for task in self._tasks:
                assert not task.done(), task.exception()
            await asyncio.sleep(0.03)
        return found

    async def until_applied(self, source: Source, stamp: Stamp) -> Watermark:
        return await self.until(source, lambda watermark: watermark.applied >= stamp)

    def check(self, source: Source, *changesets: Changeset) -> None:
        """Each of ``changesets`` is a position of the store, and its disks are what they were."""
        reader = ReaderStore(str(self.store), source.machine)
        by_stamp = {point.bookmark.stamp: point for point in reader.chain().points}
        for changeset in changesets:
            point = by_stamp[changeset.stamp]
            assert [disk.size_bytes for disk in point.disks] == [
                len(image) for _, image in sorted(changeset.images.items())
            ]
            for disk, image in changeset.images.items():
                with reader.open_view(point.position, disk) as view:
                    assert view.read(0, len(image)) == image, f"disk {disk} of {point}"

    def stamps(self, source: Source) -> list[Stamp]:
        """What was applied, in order."""
        chain = ReaderStore(str(self.store), source.machine).chain()
        return [point.bookmark.stamp for point in chain.points]

    def events(self, source: Source) -> str:
        path = self.store / "machines" / str(source.machine) / "events.jsonl"
        return path.read_text() if path.exists() else ""


async def until(holds: Callable[[], bool]) -> None:
    """Wait until ``holds`` is true."""
    for _ in range(400):
        if holds():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it does not come true")


class ApplierProcess:
    """``python -m appliance.applier``."""

    def __init__(self, config: Path, log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "appliance.applier", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    @property
    def rss_bytes(self) -> int:
        """The most memory that it has had."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
        raise AssertionError(os.fspath(self.log))


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)

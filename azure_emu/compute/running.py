"""A VM's process and its monitor: found again after a restart, asked how it is, ended."""

import asyncio
import contextlib

from azure_emu.compute.launch import Boot, launch, mark_of
from azure_emu.compute.monitor import Monitor
from azure_emu.compute.process import ended, find_processes, has_argument, kill
from azure_emu.compute.step import Process
from replication.errors import UnavailableError

QUIT_SECONDS_MAX = 10.0


class Running:
    """The process of the VM whose folder is ``folder``, if there is one."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._mark = mark_of(folder)
        self._id: int | None = None
        self._looked = False
        self._monitor: Monitor | None = None

    @property
    def id(self) -> int | None:
        """Of the process, as far as was looked."""
        return self._id

    @property
    def monitor(self) -> Monitor | None:
        """While it is connected."""
        return self._monitor

    async def start(self, boot: Boot) -> None:
        """Raises as `launch` does."""
        self._looked = False  # should it fail, nobody knows what has become of it
        self._id = await launch(boot)
        self._looked = True

    async def look(self) -> Process:
        """How it is now. Raises UnavailableError when it runs and does not answer."""
        if not self._looked:
            self._id = next(iter(find_processes(self._mark)), None)
            self._looked = True
        if self._id is None or not has_argument(self._id, self._mark):
            self._id = None
            await self.disconnect()
            return Process.NONE
        try:
            if self._monitor is None:
                self._monitor = await Monitor.connect(self._folder)
            return await _state(self._monitor)
        except UnavailableError:
            await self.disconnect()
            if has_argument(self._id, self._mark):
                raise
            return Process.NONE

    async def end(self) -> None:
        """Let it flush and end, or kill it; it is gone on return."""
        if self._id is None:
            return
        if self._monitor is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(QUIT_SECONDS_MAX):
                    await self._monitor.quit()
                    await ended(self._id)
        if has_argument(self._id, self._mark):
            await kill(self._id)
        await self.disconnect()
        self._looked = False

    async def disconnect(self) -> None:
        """Let go of the monitor; the process goes on."""
        monitor, self._monitor = self._monitor, None
        if monitor is not None:
            await monitor.close()


async def _state(monitor: Monitor) -> Process:
    status = await monitor.status()
    if status == "io-error":
        return Process.FULL if await monitor.disk_is_full() else Process.STUCK
    if status == "internal-error":
        return Process.STUCK
    if status in ("shutdown", "guest-panicked"):
        return Process.HALTED
    return Process.RUNNING

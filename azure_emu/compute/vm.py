"""A VM as the parts that work on it see it: its record, its folder, its process, what is known."""

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from azure_emu.compute.admission import Admission
from azure_emu.compute.config import ComputeConfig
from azure_emu.compute.disk import Disk, disks_of, is_independent, source_readable, sync
from azure_emu.compute.evidence import PutEvidence
from azure_emu.compute.launch import PROCESS_BYTES, memory_of
from azure_emu.compute.network import Networks
from azure_emu.compute.record import VmFolder, VmRecord
from azure_emu.compute.running import Running
from daemon.service import Health
from replication.errors import StorageError

OWN, RECOVERY = "own", "recovery"


@dataclass(frozen=True, slots=True)
class Site:
    """What all VMs of a compute node share.

    accelerator: has a result once one has been chosen.
    tell:        has the next report go out at once.
    """

    config: ComputeConfig
    networks: Networks
    admission: Admission
    health: Health
    put_evidence: PutEvidence
    tell: Callable[[], None]
    accelerator: "asyncio.Future[str]"


class Vm:
    """reason: why it is not further, for people. share: of its disks that stands alone."""

    def __init__(self, site: Site, folder: VmFolder, record: VmRecord) -> None:
        self.id = folder.vm
        self.site = site
        self.folder = folder
        self.record = record
        self.running = Running(folder.path)
        self.news = asyncio.Event()
        self.reason = ""
        self.share = 0.0
        self._alone: set[int] = set()
        self._looked = False
        self._health_part = f"VM {record.order.name} {folder.vm}"

    @property
    def disks(self) -> list[Disk]:
        """Raises InputError for an order that makes no sense."""
        return disks_of(self.folder.path, self.site.config.points_folder, self.record.order.disks)

    @property
    def memory_bytes(self) -> int:
        """What it takes of the host while it runs."""
        recovery = self.record.guest == RECOVERY
        return memory_of(self.record.order, recovery=recovery) + PROCESS_BYTES

    @property
    def free_bytes(self) -> int:
        try:
            found = os.statvfs(self.folder.path)
        except OSError:
            return 0
        return found.f_bavail * found.f_frsize

    def write(self, **changed: Any) -> None:
        """Write the record down with what has changed. Raises StorageError."""
        record = self.record.model_copy(update=changed)
        self.folder.write(record)
        self.record = record
        self.site.tell()

    def tell(self, reason: str) -> None:
        """Say in report and health why it is not further; empty: nothing is in the way."""
        if reason != self.reason:
            self.reason = reason
            self.site.health.report(self._health_part, warning=reason)
            self.site.tell()

    def log(self, event: str, **fields: Any) -> None:
        structlog.get_logger().info(event, vm=self.record.order.name, id=str(self.id), **fields)

    async def pause(self, seconds: float) -> None:
        """Until there is news, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.news.wait()

    async def dependent(self, *, look: bool = False) -> list[Disk]:
        """The disks that still need their points, as was last looked: it takes a process each.

        A disk that stands alone never needs its point again: it counts as such once all of it is
        synced. Raises StorageError, UnavailableError.
        """
        disks = self.disks
        if look or not self._looked:
            for disk in disks:
                if disk.index not in self._alone and await self._stands_alone(disk):
                    self._alone.add(disk.index)
            self._looked = True
        return [disk for disk in disks if disk.index not in self._alone]

    async def _stands_alone(self, disk: Disk) -> bool:
        if not await is_independent(disk):
            return False
        monitor = self.running.monitor
        if monitor is not None:
            await monitor.flush(disk.node)
        elif self.running.id is not None:
            return False  # it is silent, and holds what nobody knows
        await asyncio.to_thread(sync, disk)
        return True


async def unreadable(disks: list[Disk]) -> str:
    """Why what disks stand on cannot be read; empty when it can. A file system that hangs holds up
    its own VMs alone.
    """
    return await asyncio.to_thread(_unreadable, disks)


def _unreadable(disks: list[Disk]) -> str:
    for disk in disks:
        try:
            source_readable(disk)
        except StorageError as error:
            return str(error)
    return ""

"""A compute node inside the test's own process, on real QEMU, and no trace of it afterwards."""

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from azure_emu.compute.config import ComputeConfig, NetworkConfig
from azure_emu.compute.launch import mark_of
from azure_emu.compute.network import NAMESPACES
from azure_emu.compute.node import NETWORKS_FOLDER, VMS_FOLDER, Node
from azure_emu.compute.process import find_processes, kill
from azure_emu.compute.tool import try_tool
from daemon.service import Health, Service
from replication.control.assignment import ComputeAssignment
from replication.control.recovery import (
    EvidenceKind,
    SourceDisk,
    VirtualMachineOrder,
    VmPower,
    VmReport,
)

SECONDS_MAX = 600.0
MIB = 1 << 20


class Place:
    """Folders and a configuration of a compute node's own.

    points: sources of disks; ``point`` makes an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.points = folder / "points"
        self.data = folder / "data"
        self.points.mkdir(parents=True)
        self.namespaces = f"ust-{uuid.uuid4().hex[:8]}"
        self.config = ComputeConfig(
            points_folder=str(self.points),
            data_folder=str(self.data),
            accelerator="tcg",
            network=NetworkConfig(namespaces=self.namespaces),
        )

    def point(self, name: str, size_bytes: int) -> SourceDisk:
        path = self.points / name
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(size_bytes)
        index = int("".join(filter(str.isdigit, name)) or 0)
        return SourceDisk(index=index, name=name, size_bytes=size_bytes, source=name)

    def order(self, *disks: SourceDisk, **changed: Any) -> VirtualMachineOrder:
        told = {"id": uuid.uuid4(), "name": "web", "machine": uuid.uuid4(), "network": "test"}
        return VirtualMachineOrder.model_validate(told | {"disks": disks} | changed)

    def vm_folder(self, vm: uuid.UUID) -> Path:
        return self.data / VMS_FOLDER / str(vm)

    def processes(self, vm: uuid.UUID) -> list[int]:
        return find_processes(mark_of(str(self.vm_folder(vm))))

    def left_namespaces(self) -> list[str]:
        found = Path(NAMESPACES)
        return [one.name for one in found.glob(f"{self.namespaces}-*")] if found.exists() else []

    async def clear(self) -> None:
        """End and remove whatever of the node is left, also after a failure."""
        for folder in (self.data / VMS_FOLDER).glob("*"):
            for process in find_processes(mark_of(str(folder))):
                await kill(process)
        for folder in (self.data / NETWORKS_FOLDER).glob("*"):
            for process in find_processes(f"--conf-file={folder}/dnsmasq.conf"):
                await kill(process)
        for namespace in self.left_namespaces():
            await try_tool("ip", "netns", "delete", namespace)


def files_of(process: int, *, writable: bool = False) -> set[str]:
    """What a process has open; ``writable``: that alone which it may write."""
    found = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        told = Path(f"/proc/{process}/fdinfo/{descriptor.name}").read_text()
        flags = int(told.partition("flags:")[2].split()[0], 8)
        if flags & os.O_ACCMODE != os.O_RDONLY or not writable:
            found.add(str(descriptor.readlink()))
    return {name for name in found if name.startswith("/")}


class RunningNode:
    """A node that follows what `order` says. evidence: what it sent, by VM and kind."""

    def __init__(self, place: Place, group: asyncio.TaskGroup) -> None:
        self.place = place
        self.evidence: dict[tuple[uuid.UUID, EvidenceKind], bytes] = {}
        self.service = Service(asyncio.Event(), Health(), CollectorRegistry())
        self.node = Node(place.config, self.service, self._put)
        self._group = group
        self._version = 0

    async def _put(self, vm: uuid.UUID, kind: EvidenceKind, content: bytes) -> None:
        self.evidence[vm, kind] = content

    async def order(
        self, *orders: VirtualMachineOrder, removed: tuple[uuid.UUID, ...] = ()
    ) -> None:
        self._version += 1
        assignment = ComputeAssignment(version=self._version, vms=orders, removed=removed)
        await self.node.follow(assignment, self._group)

    async def report(self, vm: uuid.UUID) -> VmReport | None:
        found = await self.node.report(self._version)
        return next((one for one in found.vms if one.id == vm), None)

    async def until(self, vm: uuid.UUID, holds: Callable[[VmReport], bool]) -> VmReport:
        """The first report of which that holds."""
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            self.node.changed.clear()
            found = await self.report(vm)
            if found is not None and holds(found):
                return found
            assert time.monotonic() < deadline, (found, self.service.health)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.node.changed.wait()

    async def until_removed(self, vm: uuid.UUID) -> None:
        deadline = time.monotonic() + SECONDS_MAX
        while vm not in (found := await self.node.report(self._version)).removed:
            assert time.monotonic() < deadline, found
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def running(place: Place) -> AsyncIterator[RunningNode]:
    """The node, until the context ends; its VMs outlive that."""
    async with asyncio.TaskGroup() as group:
        site = RunningNode(place, group)
        await site.node.run(group)
        try:
            yield site
        finally:
            await site.node.stop()


__all__ = ["MIB", "Place", "RunningNode", "VmPower", "files_of", "running"]

"""All VMs of a compute node: adopted from the disk, ordered by assignments, told in reports.

One that no assignment names is left as it is; only one that is named in ``removed`` goes.
"""

import asyncio
import contextlib
import importlib.metadata
import os
import time
import uuid
from collections.abc import Iterator

from azure_emu.compute.accelerator import choose_accelerator, clear_probes
from azure_emu.compute.admission import Admission
from azure_emu.compute.config import ComputeConfig
from azure_emu.compute.confine import landlock_version
from azure_emu.compute.evidence import PutEvidence
from azure_emu.compute.machine import Machine
from azure_emu.compute.network import Networks
from azure_emu.compute.record import VmFolder, VmRecord, find_folders
from azure_emu.compute.reporting import fitting
from azure_emu.compute.vm import Site
from daemon.durable import make_folder
from daemon.load import LoadMeter
from daemon.service import Service
from daemon.troubles import troubles_of
from replication.control.assignment import ComputeAssignment
from replication.control.recovery import VMS_MAX, VirtualMachineOrder
from replication.control.report import ComputeReport
from replication.errors import ConfigError, ReplicationError, StorageError

VMS_FOLDER, NETWORKS_FOLDER = "vms", "networks"


class Node:
    """All work on VMs is in tasks of a group; the VMs themselves go on without it.

    changed: there is something to report. adopted: all that was there is known.
    """

    def __init__(self, config: ComputeConfig, service: Service, put_evidence: PutEvidence) -> None:
        """Raises StorageError; ConfigError on a kernel that cannot confine VMs as it should."""
        self._config = config
        self._health = service.health
        self._judge_kernel()
        self._load = LoadMeter()
        self._started_ns = time.time_ns()
        self._software = importlib.metadata.version("understudy")
        self._vms_folder = os.path.join(config.data_folder, VMS_FOLDER)
        make_folder(self._vms_folder)
        self._machines: dict[uuid.UUID, Machine] = {}
        self._tasks: dict[uuid.UUID, asyncio.Task[None]] = {}
        self._removed: tuple[uuid.UUID, ...] = ()
        self._damaged: set[uuid.UUID] = set()
        self._accelerator: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.changed = asyncio.Event()
        self.adopted = asyncio.Event()
        networks = os.path.join(config.data_folder, NETWORKS_FOLDER)
        self._site = Site(
            config=config,
            networks=Networks(networks, config.network),
            admission=Admission(config.memory_max(), config.boots_max),
            health=service.health,
            put_evidence=put_evidence,
            tell=self.changed.set,
            accelerator=self._accelerator,
        )

    def _judge_kernel(self) -> None:
        if landlock_version():
            return
        if self._config.landlock == "required":
            raise ConfigError(
                "this kernel has no Landlock: a VM that breaks out of QEMU reads the host's files",
                hint='boot with lsm=landlock,…; or accept that: landlock = "optional"',
            )
        told = "this kernel has no Landlock: QEMU may read what root may without capabilities"
        self._health.report("confinement", warning=told)

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Adopt what there is, and choose an accelerator; returns when that is done."""
        await clear_probes(self._config.data_folder)
        for folder in find_folders(self._vms_folder):
            try:
                record = folder.read()
            except StorageError as error:
                self._damaged.add(folder.vm)
                self._health.report(f"VM {folder.vm}", critical=str(error))
                continue
            if record is None:
                await asyncio.to_thread(folder.remove)  # killed before its first step
            else:
                self._add(group, folder, record)
        known = set(self._machines) | self._damaged
        await self._site.networks.remove_unused(known)
        self.adopted.set()
        chosen = await choose_accelerator(
            self._config.accelerator, self._config.guest_folder, self._config.data_folder
        )
        self._accelerator.set_result(chosen)

    async def follow(self, assignment: ComputeAssignment, group: asyncio.TaskGroup) -> None:
        """Carry an assignment out; what cannot be written down is told and left as it was."""
        ordered = {order.id: order for order in assignment.vms}
        removed = [vm for vm in assignment.removed if vm not in ordered]
        for vm, order in ordered.items():
            with self._told(vm):
                self._order(group, vm, order)
        for vm in removed:
            machine = self._machines.get(vm)
            if machine is not None:
                with self._told(vm):
                    machine.remove()
        self._removed = tuple(removed)
        self.changed.set()

    def _order(self, group: asyncio.TaskGroup, vm: uuid.UUID, order: VirtualMachineOrder) -> None:
        if vm in self._damaged:
            return
        machine = self._machines.get(vm)
        if machine is None:
            folder = VmFolder(self._vms_folder, vm)
            record = VmRecord(order=order)
            folder.write(record)
            self._add(group, folder, record)
        elif not machine.record.removing:
            machine.take(order)

    def _add(self, group: asyncio.TaskGroup, folder: VmFolder, record: VmRecord) -> None:
        machine = Machine(self._site, folder, record)
        self._machines[folder.vm] = machine
        task = group.create_task(self._live(folder.vm, machine), name=f"vm {folder.vm}")
        self._tasks[folder.vm] = task

    async def _live(self, vm: uuid.UUID, machine: Machine) -> None:
        await machine.run()
        self._machines.pop(vm, None)
        self._tasks.pop(vm, None)
        self.changed.set()

    async def stop(self) -> None:
        """End the work on all VMs; they run on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._accelerator.cancel()

    @contextlib.contextmanager
    def _told(self, vm: uuid.UUID) -> Iterator[None]:
        part = f"order of VM {vm}"
        try:
            yield
        except ReplicationError as error:
            self._health.report(part, warning=str(error))
        else:
            self._health.report(part)

    async def report(self, version: int) -> ComputeReport:
        """The whole report of now; ``version``: of the assignment that is followed."""
        found = await asyncio.to_thread(os.statvfs, self._config.data_folder)
        machines = list(self._machines.values())[:VMS_MAX]
        reports = [await asyncio.to_thread(machine.report) for machine in machines]
        accelerator = self._accelerator.result() if self._accelerator.done() else ""
        return ComputeReport(
            software=self._software,
            time_ns=time.time_ns(),
            started_ns=self._started_ns,
            assignment=version,
            load=self._load.read(),
            troubles=troubles_of(self._health),
            free_bytes=found.f_bavail * found.f_frsize,
            accelerator=accelerator,
            vms=fitting(reports),
            removed=tuple(
                vm for vm in self._removed if vm not in self._machines and vm not in self._damaged
            ),
        )

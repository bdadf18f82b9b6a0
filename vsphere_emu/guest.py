"""A guest: VMDKs attached as loop devices, file systems mounted, a workload running.

Nothing of its state is kept: the kernel knows what is attached, mounted and running. Each step
looks first, so that any command goes on from wherever an earlier one was cut off.
"""

import contextlib
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from daemon.durable import make_folder, sync_folder, write_whole
from replication.errors import ConfigError, StorageError
from vsphere_emu import block_device, processes
from vsphere_emu.config import DiskConfig, GuestConfig
from vsphere_emu.datastore import Datastore, Vmdk
from vsphere_emu.workload import life
from vsphere_emu.workload.database import (
    forget_server,
    server_of,
    shared_memory_of,
    socket_folder,
    stop_stray,
)

CUT_SECONDS_MAX = 20.0


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """A disk as the kernel knows it.

    device: the loop device, None while detached; mount: where it is mounted, None if it is not.
    """

    name: str
    vmdk: str
    flat_path: str
    size_bytes: int
    file_system: str
    device: str | None
    mount: str | None


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """A guest as the kernel knows it.

    workload_pid: None while no workload runs.
    socket_folder: where its PostgreSQL listens while the workload runs, None for others.
    """

    name: str
    is_powered_on: bool
    workload: str | None
    workload_pid: int | None
    socket_folder: str | None
    disks: tuple[DiskStatus, ...]


class Guest:
    """One machine of the lab; its mounts are ``<root>/guests/<name>/<mount point>``."""

    def __init__(self, config: GuestConfig, datastore: Datastore, root_folder: str) -> None:
        self.config = config
        self._datastore = datastore
        self.root_folder = root = os.path.abspath(root_folder)
        self.folder = os.path.join(root, "guests", config.name)
        self._run_folder = os.path.join(root, "run")
        self.lock_path = os.path.join(self._run_folder, f"{config.name}.workload")
        self.log_path = os.path.join(self._run_folder, f"{config.name}.log")

    def create_disks(self) -> None:
        """Create what disks are missing, as power-on does, and leave the guest as it is."""
        with self._alone():
            for disk in self.config.disks:
                self._vmdk(disk)

    def power_on(self) -> None:
        """Create what disks are missing, attach them, make file systems once, mount them."""
        with self._alone():
            for disk in self.config.disks:
                vmdk = self._vmdk(disk)
                device = block_device.attach(vmdk.flat_path)
                if disk.file_system != "none":
                    if disk.image is None:
                        self._make_file_system(disk, device)
                    else:
                        device = self._partition(disk, device)
                    point = self.mount_point(disk)
                    make_folder(point, mode=0o755)
                    block_device.mount(device, point, disk.file_system, disk.mount_options)

    def power_off(self) -> None:
        """Stop the workload, unmount and detach, all written out; fine if it is off."""
        with self._alone():
            self._stop_workload()
            for disk in reversed(self.config.disks):
                if disk.file_system != "none":
                    block_device.unmount(self.mount_point(disk))
                block_device.detach(self._datastore.flat_path(self.vmdk_path(disk)))

    def cut_power(self) -> None:
        """Switch it off as a power cut does: nothing is written out; fine if it is off.

        First all processes are as good as dead: one that waits in a write to a frozen file system
        ends within the kernel, so nobody hears that anything was written. Only then the file
        systems are cut off from their disks, and thawed.
        """
        with self._alone():
            points = [self.mount_point(disk) for disk in self.config.disks]
            segments = {point: shared_memory_of(point) for point in points}
            condemned = processes.condemn(self._process_ids(points))
            flats = [self._datastore.flat_path(self.vmdk_path(disk)) for disk in self.config.disks]
            with contextlib.ExitStack() as frozen:
                for point in points:
                    if (fd := block_device.cut_off(point)) is not None:
                        frozen.callback(block_device.thaw, fd)
                # Whoever reads a disk lets go of it now, and knows before anything is thawed.
                going = [device for flat in flats for device in block_device.begin_detach(flat)]
            processes.await_end(condemned, CUT_SECONDS_MAX)
            for point, ids in segments.items():
                forget_server(point, ids)
            for point in reversed(points):
                block_device.unmount_by_force(point)
            block_device.forget_partitions(going)
            for flat in flats:
                block_device.detach(flat)

    def _process_ids(self, points: Sequence[str]) -> list[int]:
        """The workload, and servers that have lost theirs."""
        found = [life.holder(self.lock_path), *map(server_of, points)]
        return [pid for pid in found if pid is not None]

    def start_workload(self) -> int | None:
        """Start what the guest does, if anything; return the process id once it is at work."""
        workload = self.config.workload
        if workload is None:
            return None
        with self._alone():
            if not self.status().is_powered_on:
                raise ConfigError(
                    f"{self.config.name} is off", hint=f"power-on {self.config.name} first"
                )
            command = [sys.executable, "-m", "vsphere_emu.workload", "--lock", self.lock_path]
            command += ["--workload", workload.model_dump_json()]
            for disk in self.config.disks:
                if disk.file_system != "none":
                    command += ["--mount", f"{disk.name}={self.mount_point(disk)}"]
            return life.start(command, self.lock_path, self.log_path)

    def stop_workload(self) -> None:
        """End what the guest does in good order; fine if it does nothing."""
        with self._alone():
            self._stop_workload()

    def status(self) -> GuestStatus:
        """What there is now."""
        disks = tuple(self._disk_status(disk) for disk in self.config.disks)
        workload = self.config.workload
        database = workload is not None and workload.kind == "pgbench"
        return GuestStatus(
            name=self.config.name,
            is_powered_on=all(
                disk.device is not None and (disk.mount is not None or disk.file_system == "none")
                for disk in disks
            ),
            workload=workload.kind if workload is not None else None,
            workload_pid=life.holder(self.lock_path),
            socket_folder=self.socket_folder if database else None,
            disks=disks,
        )

    def remove_all_traces(self, *, delete_disks: bool) -> None:
        """Take away every process, mount, loop device and folder, whatever state they are in.

        Frozen file systems are thawed; what others hold open goes when they let go. With
        ``delete_disks`` the VMDKs go too. Raises StorageError for a disk that stays attached; all
        else is gone then.
        """
        held: list[StorageError] = []
        with self._alone():
            self._stop_workload()
            for one in reversed(block_device.mounts()):
                if one.point.startswith(os.path.realpath(self.folder) + "/"):
                    block_device.unmount_by_force(one.point)
            for disk in self.config.disks:
                path = self.vmdk_path(disk)
                try:
                    block_device.detach(self._datastore.flat_path(path))
                except StorageError as error:
                    held.append(error)
                if delete_disks:
                    self._datastore.delete(path)
            if delete_disks:
                self._delete_vcenter_files()
            for name in (self.lock_path, self.log_path, *map(self._marker, self.config.disks)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
            for disk in self.config.disks:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(self.mount_point(disk))
            shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.unlink(self._guard_path)
        for folder in (os.path.dirname(self.folder), self._run_folder, self.root_folder):
            with contextlib.suppress(OSError):  # others' things are still there
                os.rmdir(folder)
        if held:
            raise held[0]

    def _delete_vcenter_files(self) -> None:
        """What the emulated vCenter writes beside the disks."""
        folder = os.path.join(self._datastore.folder, self.config.name)
        for name in (f"{self.config.name}.vmx", f"{self.config.name}.nvram", "vmware.log"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
        with contextlib.suppress(OSError):  # others' files, or gone: both fine
            os.rmdir(folder)

    def mount_point(self, disk: DiskConfig) -> str:
        """Where the disk's file system is mounted while the guest is on."""
        return os.path.join(self.folder, disk.mount_point or disk.name)

    def vmdk_path(self, disk: DiskConfig) -> str:
        """The disk's path in the datastore."""
        return f"[{self._datastore.name}] {self.config.name}/{disk.name}.vmdk"

    @property
    def socket_folder(self) -> str | None:
        """Where the guest's PostgreSQL listens while it runs."""
        workload = self.config.workload
        if workload is None or workload.kind != "pgbench":
            return None
        data = next(disk for disk in self.config.disks if disk.name == workload.data_disk)
        return socket_folder(self.mount_point(data))

    @property
    def _guard_path(self) -> str:
        return os.path.join(self._run_folder, f"{self.config.name}.guard")

    def _marker(self, disk: DiskConfig) -> str:
        return os.path.join(self._run_folder, f"{self.config.name}.{disk.name}.formatting")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One command at a time works on a guest; others wait."""
        make_folder(self._run_folder)
        while True:
            fd = os.open(self._guard_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._guard_path)):
                    break
            os.close(fd)  # the guard was removed while we waited for it
        try:
            yield
        finally:
            os.close(fd)

    def _vmdk(self, disk: DiskConfig) -> Vmdk:
        path = self.vmdk_path(disk)
        if not self._datastore.exists(path):
            return self._datastore.create(path, disk.size_bytes, disk.image)
        vmdk = self._datastore.open(path)
        if vmdk.size_bytes != disk.size_bytes:
            raise ConfigError(
                f"{path} has {vmdk.size_bytes} bytes, the configuration says {disk.size_bytes}",
                hint="correct size_bytes, or remove the guest with its disks",
            )
        return vmdk

    def _partition(self, disk: DiskConfig, device: str) -> str:
        """The device of the first partition. It is a part of the whole disk's, not a second loop
        device over the same file: what tracks the disk sees each write.
        """
        partition = block_device.first_partition(device)
        present = block_device.file_system_of(partition) if partition else ""
        if partition is None or present != disk.file_system:
            raise StorageError(
                f"the first partition of {self.vmdk_path(disk)} holds "
                f"{present or 'no file system'}, the configuration says {disk.file_system}",
                hint="correct image or file_system, or remove the guest with its disks",
            )
        return partition

    def _make_file_system(self, disk: DiskConfig, device: str) -> None:
        """Once; a marker tells of one that was cut off in the middle."""
        marker = self._marker(disk)
        present = block_device.file_system_of(device)
        if os.path.exists(marker) or not present:
            write_whole(marker, b"")
            block_device.make_file_system(device, disk.file_system)
            os.unlink(marker)
            sync_folder(self._run_folder)
        elif present != disk.file_system:
            raise StorageError(
                f"{self.vmdk_path(disk)} holds {present}, the configuration says "
                f"{disk.file_system}",
                hint="correct file_system, or remove the guest with its disks",
            )

    def _stop_workload(self) -> None:
        life.stop(self.lock_path)
        for disk in self.config.disks:
            stop_stray(self.mount_point(disk))

    def _disk_status(self, disk: DiskConfig) -> DiskStatus:
        path = self.vmdk_path(disk)
        flat = self._datastore.flat_path(path)
        point = self.mount_point(disk)
        return DiskStatus(
            name=disk.name,
            vmdk=path,
            flat_path=flat,
            size_bytes=disk.size_bytes,
            file_system=disk.file_system,
            device=next(iter(block_device.loops_of(flat)), None),
            mount=point if block_device.mounted_at(point) is not None else None,
        )

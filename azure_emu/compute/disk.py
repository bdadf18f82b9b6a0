"""Managed disks: qcow2 overlays over the files of a recovery point.

A disk is there whole or not: it is made under another name, synced, and renamed. What is written
goes to the overlay, and the point stays as it is. Clusters are whole: with parts of clusters
(extended_l2) QEMU before 8.1 aborts when it streams.

Whoever broke out of a VM may have written its file anew: qemu-img, which reads it, is confined to
the file and its point, and told the format.

Source: QEMU docs/interop/qcow2.txt; qemu-img(1).
"""

import asyncio
import contextlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from azure_emu.compute.confine import confined
from azure_emu.compute.tool import any_line, run_tool, try_tool
from daemon.durable import make_folder, storage_error, sync_folder
from replication.control.recovery import SourceDisk
from replication.errors import ConflictError, InputError, StorageError

SECTOR_BYTES = 512
OPTIONS = "cluster_size=64k"
MADE_AT_ONCE_MAX = 8
SNAPSHOT_NAME_CHARACTERS_MAX = 64
_PENDING = ".new"


@dataclass(frozen=True, slots=True)
class Disk:
    """path: of the qcow2 file. source: of the point's file, below which it stands for a while."""

    index: int
    path: str
    source: str
    size_bytes: int

    @property
    def node(self) -> str:
        """Its name in QEMU."""
        return f"disk{self.index}"


def disks_of(folder: str, points_folder: str, ordered: Sequence[SourceDisk]) -> list[Disk]:
    """The disks of a VM, whose own folder is ``folder``.

    Raises InputError for a source that is not below the folder of points, a size that is no
    multiple of a sector, or an index twice.
    """
    disks = []
    for each in ordered:
        source = os.path.normpath(os.path.join(points_folder, each.source))
        if not source.startswith(points_folder.rstrip("/") + "/"):
            raise InputError(f"disk {each.index}: {each.source} is not below {points_folder}")
        if each.size_bytes % SECTOR_BYTES or not each.size_bytes:
            raise InputError(f"disk {each.index}: a size of {each.size_bytes} bytes is none")
        path = os.path.join(folder, f"disk{each.index}.qcow2")
        disks.append(Disk(each.index, path, source, each.size_bytes))
    if len({disk.index for disk in disks}) != len(disks):
        raise InputError("two disks have the same index")
    return sorted(disks, key=lambda disk: disk.index)


async def make_disks(disks: Sequence[Disk]) -> float:
    """Make those that are missing; returns how many seconds it took.

    Raises StorageError: the source cannot be read or has another size, the folder refuses.
    """
    began = time.monotonic()
    slots = asyncio.Semaphore(MADE_AT_ONCE_MAX)

    async def make(disk: Disk) -> None:
        async with slots:
            await _make(disk)

    missing = [disk for disk in disks if not _exists(disk.path)]
    ends = await asyncio.gather(*map(make, missing), return_exceptions=True)
    for end in ends:
        if end is not None:
            raise end
    if disks:
        await asyncio.to_thread(sync_folder, os.path.dirname(disks[0].path))
    return time.monotonic() - began


async def _make(disk: Disk) -> None:
    await asyncio.to_thread(source_readable, disk)
    make_folder(os.path.dirname(disk.path))
    pending = disk.path + _PENDING
    _unlink(pending)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", disk.source]
    await run_tool(*command, "-o", OPTIONS, pending, str(disk.size_bytes))
    await asyncio.to_thread(_sync_and_rename, pending, disk.path)


def source_readable(disk: Disk) -> None:
    """Raises StorageError unless the point's file can be read and has the size that it should."""
    try:
        fd = os.open(disk.source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            os.pread(fd, SECTOR_BYTES, max(0, size - SECTOR_BYTES))
        finally:
            os.close(fd)
    except OSError as error:
        raise StorageError(
            f"cannot read {disk.source}: {error.strerror}",
            hint="is the applier running, with points_mount, and is the point held?",
        ) from error
    if size != disk.size_bytes:
        raise StorageError(f"{disk.source} has {size} bytes, not {disk.size_bytes}")


async def is_independent(disk: Disk) -> bool:
    """Whether the disk stands alone; also of one that is in use. Raises StorageError."""
    return "backing-filename" not in await _info(disk)


async def needs_source(disk: Disk) -> bool:
    """Whether the tables in the file, as they are now, leave data to the point; also of a disk that
    is in use. Raises StorageError.
    """
    command = ["qemu-img", "map", "-U", "-f", "qcow2", "--output=json", disk.path]
    return await any_line(_reading(disk, command), _left_to_source)


def _left_to_source(line: bytes) -> bool:
    return b'"depth"' in line and b'"depth": 0,' not in line and b'"data": true' in line


async def refuse_snapshots(disk: Disk) -> None:
    """Raises StorageError for a disk with snapshots: what they stand on would stay with the point,
    and nobody copies it.
    """
    if (await _info(disk)).get("snapshots"):
        raise StorageError(
            f"{disk.path} keeps snapshots and cannot be made to stand alone",
            hint="delete them: understudy-compute disk delete-snapshot, VM switched off",
        )


async def _info(disk: Disk) -> dict[str, Any]:
    command = ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", disk.path]
    told = json.loads(await run_tool(*_reading(disk, command)))
    assert isinstance(told, dict)
    return told


def sync(disk: Disk) -> None:
    """Have the file and its name outlive a power failure. Raises StorageError."""
    _sync(disk.path)
    sync_folder(os.path.dirname(disk.path))


async def make_independent(disk: Disk) -> None:
    """Copy the disk, and put the copy in its place. Nobody uses the disk; ended at any point, it is
    as before, or copied. The copy needs room beside the disk for as long as both are there, and
    takes as long as it takes. Raises StorageError, also for a disk with snapshots.
    """
    await refuse_snapshots(disk)
    pending = disk.path + _PENDING
    _unlink(pending)
    command = ["qemu-img", "convert", "-q", "-f", "qcow2", "-O", "qcow2", "-o", OPTIONS]
    try:
        _make_empty(pending)
        whole = _reading(disk, [*command, disk.path, pending], write=pending)
        await run_tool(*whole, seconds_max=None)
        await asyncio.to_thread(_sync, pending)
        _rename(pending, disk.path)  # here, as a thread would go on when this is cancelled
    finally:
        _unlink(pending)
    await asyncio.to_thread(sync, disk)


async def snapshot(disk: Disk, name: str) -> None:
    """Keep how the disk is now under a name. Raises ConflictError while a VM has it, or while it
    stands on its point: the point may go, and takes with it what the snapshot needs.
    """
    if not name or len(name) > SNAPSHOT_NAME_CHARACTERS_MAX or name.startswith("-"):
        raise InputError(f"{name!r} is no name for a snapshot")
    if not await is_independent(disk):
        raise ConflictError(
            f"{disk.path} still stands on its point",
            hint="order the VM's disks to stand alone first",
        )
    await _snapshot(disk, "-c", name)


async def delete_snapshot(disk: Disk, name: str) -> None:
    await _snapshot(disk, "-d", name)


async def _snapshot(disk: Disk, verb: str, name: str) -> None:
    # Not told the format it would look for another one.
    image = f"driver=qcow2,file.driver=file,file.filename={disk.path.replace(',', ',,')}"
    command = ["qemu-img", "snapshot", "-q", verb, name, "--image-opts", image]
    await _unused(disk, confined(command, write=[disk.path], read=[disk.source], search=True))


async def export(disk: Disk, target: str) -> None:
    """Write the whole disk as a raw, sparse file; it is there whole or not.

    Raises ConflictError while a VM has it, StorageError.
    """
    if _exists(target):
        raise InputError(f"{target} is there already")
    pending = f"{target}.{secrets.token_hex(4)}{_PENDING}"
    try:
        _make_empty(pending)
        command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk.path, pending]
        await _unused(disk, _reading(disk, command, write=pending))
        await asyncio.to_thread(_sync_and_rename, pending, target)
        await asyncio.to_thread(sync_folder, os.path.dirname(target) or ".")
    finally:
        _unlink(pending)


def _reading(disk: Disk, command: Sequence[str], write: str = "") -> list[str]:
    """The command, which may read the disk and its point, and write that file."""
    read = [disk.path, disk.source]
    return confined(command, read=read, write=[write] if write else [], search=True)


def _make_empty(path: str) -> None:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise storage_error("make", path, error) from error


async def _unused(disk: Disk, command: Sequence[str]) -> None:
    code, _, said = await try_tool(*command, seconds_max=None)
    if code == 0:
        return
    words = said.decode(errors="replace").strip()
    if "lock" in words:
        raise ConflictError(f"{disk.path} is in use", hint="switch the VM off first")
    raise StorageError(f"qemu-img failed on {disk.path}: {words[-600:]}")


def space_bytes(disks: Sequence[Disk]) -> int:
    """What the disks take of the file system."""
    total = 0
    for disk in disks:
        with contextlib.suppress(OSError):
            total += os.stat(disk.path).st_blocks * 512
    return total


async def read_head(disk: Disk, size: int) -> bytes:
    """The beginning of the disk as it is now. Raises StorageError."""
    copy = disk.path + ".head"
    command = ["qemu-img", "dd", "-U", "-f", "qcow2", "-O", "raw", f"bs={size}", "count=1"]
    _unlink(copy)
    try:
        _make_empty(copy)
        whole = [*command, f"if={disk.path}", f"of={copy}"]
        await run_tool(*_reading(disk, whole, write=copy))
        return await asyncio.to_thread(_read, copy, size)
    finally:
        _unlink(copy)


def _sync_and_rename(pending: str, path: str) -> None:
    _sync(pending)
    _rename(pending, path)


def _sync(path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise storage_error("sync", path, error) from error


def _rename(pending: str, path: str) -> None:
    try:
        os.rename(pending, path)
    except OSError as error:
        raise storage_error("make", path, error) from error


def _read(path: str, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except OSError as error:
        raise storage_error("read", path, error) from error


def _exists(path: str) -> bool:
    return os.path.lexists(path)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)

"""Whether a recovered disk is good: its journal replayed on a copy, then the checker's word.

The image itself is only read. A sparse copy (by ``cp`` where nobody gives a quicker way) is
attached, mounted once so that the kernel replays the journal as it would after a power cut,
unmounted, and checked by the file system's own tool; of a disk with a partition table, this is done
with the first partition. Databases are started on copies too, and do their own recovery.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from replication.errors import IntegrityError, ReplicationError, StorageError
from vsphere_emu import block_device
from vsphere_emu.tool import run_tool, tail, try_tool
from vsphere_emu.workload.database import BalanceSums, Database, pgbench_invariant

_CHECKERS = {
    "ext4": ("e2fsck", "-fn"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}
LOG_BYTES_SHOWN = 2000

Copier = Callable[[str, str], object]
"""Writes the content of an image (first path) into a new sparse file (second path)."""

# The source with the same UUID may be mounted on this very machine: XFS must be told.
_OPTIONS = {"ext4": "rw", "xfs": "rw,nouuid", "btrfs": "rw"}


@dataclass(frozen=True, slots=True)
class FileSystemReport:
    """A clean file system: its type, and how much of it is in use."""

    file_system: str
    used_bytes: int
    files: int


def check_file_system(
    image: str,
    scratch_folder: str,
    inspect: Callable[[str], object] | None = None,
    *,
    copy: Copier | None = None,
) -> FileSystemReport:
    """Check one image; ``inspect`` is called with the copy's mount point after the replay.

    Raises IntegrityError with the checker's last words, or what ``inspect`` raises.
    """
    with _copied(image, scratch_folder, copy) as (device, point):
        kind = _mount(image, device, point)
        space = os.statvfs(point)
        try:
            if inspect is not None:
                inspect(point)
        finally:
            block_device.unmount(point)
        _run_checker(image, device, kind)
        return FileSystemReport(
            file_system=kind,
            used_bytes=(space.f_blocks - space.f_bfree) * space.f_frsize,
            files=space.f_files - space.f_ffree,
        )


def check_database(
    data_image: str, wal_image: str, scratch_folder: str, *, copy: Copier | None = None
) -> BalanceSums:
    """Start PostgreSQL from two images of one moment; return pgbench's sums, which agree.

    Raises IntegrityError when a file system cannot be mounted, PostgreSQL does not recover, the
    sums differ, or a file system is not clean afterwards.
    """
    with (
        _copied(data_image, scratch_folder, copy) as (data_device, data_point),
        _copied(wal_image, scratch_folder, copy) as (wal_device, wal_point),
    ):
        kinds = (
            _mount(data_image, data_device, data_point),
            _mount(wal_image, wal_device, wal_point),
        )
        try:
            sums = _sums(data_point, wal_point, data_image)
        finally:
            block_device.unmount(data_point)
            block_device.unmount(wal_point)
        _run_checker(data_image, data_device, kinds[0])
        _run_checker(wal_image, wal_device, kinds[1])
        return sums


def _sums(data_point: str, wal_point: str, image: str) -> BalanceSums:
    with tempfile.TemporaryFile() as log:
        database = Database(data_point, wal_point, log=log.fileno())
        link = os.path.join(database.folder, "pg_wal")
        try:
            os.unlink(link)  # it leads to the source's mount
            os.symlink(database.wal_folder, link)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(database.folder, "postmaster.pid"))
        except OSError as error:
            raise IntegrityError(f"{image} holds no database: {error}") from error
        try:
            database.start()
            sums = pgbench_invariant(database.socket_folder)
            database.stop()
        except IntegrityError:
            raise
        except ReplicationError as error:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_BYTES_SHOWN))
            said = log.read().decode(errors="replace").strip()
            raise IntegrityError(
                f"PostgreSQL does not recover from {image}: {error}; it said: {said}"
            ) from error
        finally:
            database.kill()
        return sums


@contextlib.contextmanager
def _copied(image: str, scratch_folder: str, copier: Copier | None) -> Iterator[tuple[str, str]]:
    """The device of a copy (or its first partition) and an empty mount point; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="check-", dir=scratch_folder) as folder:
        copy, point = os.path.join(folder, "disk.img"), os.path.join(folder, "mount")
        os.mkdir(point)
        (copier or _copy)(image, copy)
        os.chmod(copy, 0o600)  # a recovery point's own file is read-only
        try:
            device = block_device.attach(copy)
            yield block_device.first_partition(device) or device, point
        finally:
            block_device.unmount_by_force(point)
            block_device.detach(copy)


def _copy(image: str, copy: str) -> None:
    run_tool("cp", "--sparse=always", "--reflink=auto", image, copy)


def _mount(image: str, device: str, point: str) -> str:
    kind = block_device.file_system_of(device)
    if kind not in _CHECKERS:
        raise IntegrityError(f"{image} holds no known file system, but {kind or 'nothing'}")
    try:
        block_device.mount(device, point, kind, _OPTIONS[kind])
    except StorageError as error:
        if kind != "btrfs":
            raise IntegrityError(f"{image} cannot be mounted: {error}") from error
        # Kernels before 6.7 refuse a second btrfs of the same identity: give the copy another.
        try:
            run_tool("btrfstune", "-f", "-m", device)
            block_device.mount(device, point, kind, _OPTIONS[kind])
        except StorageError as second:
            raise IntegrityError(f"{image} cannot be mounted: {error}; {second}") from second
    return kind


def _run_checker(image: str, device: str, kind: str) -> None:
    done = try_tool(*_CHECKERS[kind], device)
    if done.returncode != 0:
        command = " ".join(_CHECKERS[kind])
        raise IntegrityError(f"{image}: {command} says {done.returncode}: {tail(done)}")

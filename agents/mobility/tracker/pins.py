"""What of the tracker lives in bpffs: making, finding, removing it. Layout: see ``ebpf.py``.

A disk's part is whole once ``disks`` holds its bitmap, and the machine's part once all links are
pinned; both come last when it is made and go first when it is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from agents.mobility.tracker import libbpf
from daemon.durable import storage_error
from replication.block_set import BlockSet
from replication.errors import TrackingError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Collection, Iterator

    import numpy.typing as npt

    from agents.mobility.device import Device

BPFFS = "/sys/fs/bpf"
ROOT = f"{BPFFS}/understudy"
PROGRAM = os.path.join(os.path.dirname(__file__), "dirty.bpf.o")
PROGRAMS = ("issue0", "issue1", "issue2", "complete0", "complete1", "complete2")
"""What dirty.bpf.c attaches; the pin of each one's link has its name. The last makes it whole."""

MAPS = ("disks", "lost", "flights")
MACHINE_PINS = (*MAPS, *PROGRAMS)

MAKE_ATTEMPTS_MAX = 5
"""How often a folder is made again that another machine's agent removes at the same moment."""

lock = threading.Lock()


class Bitmap:
    """One pinned bitmap, mapped into memory: the kernel's own pages."""

    def __init__(self, opened: contextlib.ExitStack, path: str, block_count: int) -> None:
        self.fd = opened_pin(opened, path)
        info = libbpf.map_info(self.fd)
        self.map_id = info.map_id
        self._block_count = block_count
        bitmap_bytes = info.entry_count * libbpf.WORD_BYTES
        pages = -(-bitmap_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            mapped = mmap.mmap(self.fd, pages)
        except OSError as error:
            raise TrackingError(f"cannot map {path}: {error.strerror}") from error
        self._mapped = mapped
        self._bitmap_bytes = bitmap_bytes
        opened.callback(mapped.close)

    def _words(self) -> npt.NDArray[np.uint64]:
        count = self._bitmap_bytes // libbpf.WORD_BYTES
        return np.frombuffer(self._mapped, np.uint64, count)

    def read(self) -> BlockSet:
        return BlockSet.from_bitmap(self._words(), self._block_count)

    def clear(self) -> None:
        self._words()[:] = 0

    def is_overrun(self) -> bool:
        """Whether a bit past the last block is set, in the last word: the disk has grown."""
        used = self._block_count % 64
        return used != 0 and int(self._words()[-1]) >> used != 0


def remove_machine(machine: uuid.UUID) -> None:
    """Stop tracking all disks of a machine and remove its pins, half-made ones too."""
    with pins_changed(f"{ROOT}/{machine}"):
        remove_pins(f"{ROOT}/{machine}")


def remove_other_disks(machine: uuid.UUID, kept: Collection[int]) -> None:
    """Stop tracking the disks of a machine whose indexes are not among ``kept``."""
    machine_folder = f"{ROOT}/{machine}"
    with pins_changed(machine_folder):
        if not os.path.isdir(machine_folder):
            return
        for folder in disk_folders(machine_folder):
            if os.path.basename(folder) not in map(str, kept):
                remove_disk(machine_folder, folder)


@contextlib.contextmanager
def pins_changed(machine_folder: str) -> Iterator[None]:
    """Around changes of pins: one at a time, the system's refusals in words."""
    with lock:
        try:
            yield
        except OSError as error:
            raise storage_error("change the tracker's pins in", machine_folder, error) from error


def opened_pin(opened: contextlib.ExitStack, path: str) -> int:
    fd = libbpf.pinned(path)
    opened.callback(os.close, fd)
    return fd


def _bitmap_names(device: Device) -> list[str]:
    """The kernel's names of a disk's two bitmaps: its exact size, and which appearance it is.

    A map has no other room for what must still be true when it is adopted; 15 letters fit.
    """
    return [f"s{device.size_bytes:x}", f"d{device.identity.diskseq & (1 << 56) - 1:x}"]


def fits(machine_folder: str, folder: str, device: Device) -> bool:
    """Whether whole pins are there, for this device in its size, that have lost nothing."""
    with contextlib.ExitStack() as opened:
        if not all(os.path.exists(f"{folder}/{name}") for name in "ab"):
            return False
        infos = [libbpf.map_info(opened_pin(opened, f"{folder}/{name}")) for name in "ab"]
        disks = opened_pin(opened, f"{machine_folder}/disks")
        lost = opened_pin(opened, f"{machine_folder}/lost")
        running_id = libbpf.lookup(disks, device.dev, 4)
        return (
            [info.name for info in infos] == _bitmap_names(device)
            and running_id in [info.map_id for info in infos]
            and libbpf.lookup(lost, device.dev, 8) == 0
            and not any(
                Bitmap(opened, f"{folder}/{name}", device.block_count).is_overrun() for name in "ab"
            )
        )


def make_machine(machine_folder: str) -> None:
    """Load the program and pin it; the last link makes it whole."""
    _make_folder(machine_folder)
    with libbpf.loaded_object(PROGRAM) as handle:
        for name in MAPS:
            libbpf.pin(libbpf.map_of(handle, name), f"{machine_folder}/{name}")
        for name in PROGRAMS:
            libbpf.attach_and_pin(handle, name, f"{machine_folder}/{name}")


def make_disk(machine_folder: str, folder: str, device: Device) -> None:
    """Make a disk's bitmaps and begin to track; the entry in ``disks`` makes it whole."""
    _make_folder(folder)
    words = -(-device.block_count // 64)
    with contextlib.ExitStack() as opened:
        made = []
        for pin, name in zip("ab", _bitmap_names(device), strict=True):
            fd = libbpf.make_bitmap(name, words)
            opened.callback(os.close, fd)
            libbpf.pin(fd, f"{folder}/{pin}")
            made.append(fd)
        libbpf.pin(made[0], f"{folder}/fresh")
        libbpf.update_u64(opened_pin(opened, f"{machine_folder}/lost"), device.dev, 0)
        disks = opened_pin(opened, f"{machine_folder}/disks")
        libbpf.update_inner(disks, device.dev, made[0])


def remove_disk(machine_folder: str, folder: str) -> None:
    """Take a disk's bitmaps out of ``disks``, under whichever device, then their pins."""
    if not os.path.isdir(folder):
        return
    with contextlib.ExitStack() as opened:
        ids = {
            libbpf.map_info(opened_pin(opened, f"{folder}/{name}")).map_id
            for name in os.listdir(folder)
        }
        if os.path.exists(f"{machine_folder}/disks"):
            disks = opened_pin(opened, f"{machine_folder}/disks")
            for dev in libbpf.keys(disks):
                if libbpf.lookup(disks, dev, 4) in ids:
                    libbpf.delete(disks, dev)
                    if os.path.exists(f"{machine_folder}/lost"):
                        lost = opened_pin(opened, f"{machine_folder}/lost")
                        libbpf.delete(lost, dev)
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def remove_pins(machine_folder: str) -> None:
    if not os.path.isdir(machine_folder):
        return
    # The links first: from then on it counts as half-made.
    for name in PROGRAMS:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{machine_folder}/{name}")
    for folder in disk_folders(machine_folder):
        remove_disk(machine_folder, folder)
    for name in os.listdir(machine_folder):
        os.unlink(f"{machine_folder}/{name}")
    os.rmdir(machine_folder)
    try:
        os.rmdir(ROOT)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def disk_folders(machine_folder: str) -> list[str]:
    return [entry.path for entry in os.scandir(machine_folder) if entry.is_dir()]


def _make_folder(folder: str) -> None:
    for attempt in range(MAKE_ATTEMPTS_MAX):
        try:
            os.makedirs(folder, mode=0o700)
        except FileExistsError:
            return
        except FileNotFoundError as error:  # another machine's agent removed the folder above
            if attempt == MAKE_ATTEMPTS_MAX - 1:
                raise storage_error("create", folder, error) from error
        else:
            return


def mount_bpffs() -> None:
    """Mount bpffs where it is missing; a lock keeps two processes from hiding each other's."""
    if _is_bpffs():
        return
    with _locked_folder(os.path.dirname(BPFFS)):
        if not _is_bpffs():
            libbpf.mount_bpffs(BPFFS)


def _is_bpffs() -> bool:
    with open("/proc/self/mountinfo") as file:
        return any(line.split()[4] == BPFFS and " - bpf " in line for line in file)


@contextlib.contextmanager
def _locked_folder(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)

"""The dirty blocks of one disk, told by the kernel (dirty.bpf.c) and kept there.

Pins, in bpffs, so that all of it outlives the agent but not the boot::

    /sys/fs/bpf/understudy/<machine>/
        issue0 complete0 …   the attached copies of the program
        disks                device number -> bitmap of the running epoch
        lost                 device number -> how many changes had no bit
        flights              requests issued and not told to have completed
        <disk index>/a b     the disk's two bitmaps
        <disk index>/fresh   a once more, until the first forget()

**Why no bit is lost.** A request is marked when it is issued, and when it completes, before its
writer hears of that, in the bitmap that ``disks`` names at that moment: the *running* one; the
other is *closed*. A swap puts the closed bitmap into ``disks``. The kernel replaces the one by the
other in one step, and the system call then waits for an RCU grace period, that is until every
program that had looked up the old bitmap has ended. So after it no bit can arrive in the closed
bitmap any more: it may be read without a lock, and every later mark is in the running one. A
request under way during the swap belongs to both epochs, since its data may arrive after the closed
bitmap's blocks were read. The mark at its completion would do for that if every completion were
told (see dirty.bpf.c); as it is, ``flights`` is read after each swap, and what is in it counts to
the new epoch too. Bits are only ever cleared by ``forget``, in the closed bitmap, after a swap by
the same process.

**Why a crash loses nothing.** Which bitmap runs is read from ``disks``, never remembered. Both
stay pinned, so a process that is killed leaves its bits in one or the other, and the next ``swap``
returns both. Where the closed one still holds bits (nobody forgot them), it is swapped in with
them: they are returned now and once more by the swap after, since too many blocks are harmless.
The bits need no wait of the killed process: they are in a pinned bitmap whichever way it ended.

A tracker is whole once ``disks`` holds its bitmap, and the machine's part once all links are
pinned; both come last when it is made and go first when it is removed. What is found half-made is
made anew, and is ``fresh``.

One process at a time handles a machine (its agent); within it ``_lock`` admits one change of
``disks`` at a time. That is needed: the kernel gives a replaced element to the next update at
once, so that two updates in a row without the wait between could lead a program to another disk's
bitmap.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import threading
from typing import TYPE_CHECKING

import numpy as np

from agents.mobility.tracker import libbpf
from daemon.durable import storage_error
from replication.block_set import BlockSet
from replication.errors import TrackingError

if TYPE_CHECKING:
    import uuid
    from collections.abc import Iterator

    import numpy.typing as npt

    from agents.mobility.device import Device

BPFFS = "/sys/fs/bpf"
ROOT = f"{BPFFS}/understudy"
PROGRAM = os.path.join(os.path.dirname(__file__), "dirty.bpf.o")
PROGRAMS = ("issue0", "issue1", "issue2", "complete0", "complete1", "complete2")
"""What dirty.bpf.c attaches; the pin of each one's link has its name. The last makes it whole."""

MAPS = ("disks", "lost", "flights")
MACHINE_PINS = (*MAPS, *PROGRAMS)

FLIGHTS_MAX = 16384
_FLIGHT = struct.Struct("<IIQQ")
assert _FLIGHT.size == 24

MAKE_ATTEMPTS_MAX = 5
"""How often a folder is made again that another machine's agent removes at the same moment."""

_lock = threading.Lock()


class EbpfTracker:
    """A ``Tracker`` over the pinned program and bitmaps; see the module's text."""

    def __init__(self, machine: uuid.UUID, disk_index: int, device: Device) -> None:
        self._machine_folder = f"{ROOT}/{machine}"
        self._folder = f"{self._machine_folder}/{disk_index}"
        self._path = device.path
        self._dev = device.dev
        self._block_count = device.block_count
        self._swapped = False
        self._in_flight_path = f"/sys/block/{device.name}/inflight"
        self._counts_path = f"/sys/block/{device.name}/queue/iostats"
        self._carried = BlockSet(self._block_count)
        with contextlib.ExitStack() as opened:
            self._flights = _opened_pin(opened, f"{self._machine_folder}/flights")
            self._disks = _opened_pin(opened, f"{self._machine_folder}/disks")
            self._lost = _opened_pin(opened, f"{self._machine_folder}/lost")
            self._bitmaps = tuple(
                _Bitmap(opened, f"{self._folder}/{name}", self._block_count) for name in "ab"
            )
            self.fresh = os.path.exists(f"{self._folder}/fresh")
            self._running_bitmap()  # raises where the pins do not fit together
            self._opened = opened.pop_all()

    @classmethod
    def attach(cls, machine: uuid.UUID, disk_index: int, device: Device) -> EbpfTracker:
        """Begin to track a disk, or go on where an earlier process stopped.

        Begins anew, ``fresh``, where nothing is pinned, or what is pinned is half-made, has lost
        changes, or is for another device, size or appearance of the device (another image, say).
        Raises TrackingError where the kernel refuses, StorageError where bpffs does.
        """
        with _pins_changed(f"{ROOT}/{machine}"):
            _mount_bpffs()
            machine_folder = f"{ROOT}/{machine}"
            folder = f"{machine_folder}/{disk_index}"
            if not all(os.path.exists(f"{machine_folder}/{name}") for name in MACHINE_PINS):
                _remove_machine(machine_folder)
                _make_machine(machine_folder)
            if not _fits(machine_folder, folder, device):
                _remove_disk(machine_folder, folder)
                _make_disk(machine_folder, folder, device)
            return cls(machine, disk_index, device)

    def swap(self) -> BlockSet:
        """Close the running epoch; returns its blocks and all that are not yet forgotten.

        Waits 7 to 40 ms for the kernel. Without a ``forget`` since the last ``swap`` the earlier
        blocks are returned again, now and by the next one. Raises TrackingError when changes were
        missed: the disk needs a resync, ``remove`` and ``attach`` begin anew.
        """
        with _lock:
            running = self._running_bitmap()
            closed = self._other(running)
            unforgotten = closed.read()
            libbpf.update_inner(self._disks, self._dev, closed.fd)
            unforgotten |= self._carried
            self._carried = self._still_in_flight()
        self._swapped = True
        unforgotten |= running.read()
        self._check_lost()
        return unforgotten

    def forget(self) -> None:
        """Clear what the last ``swap`` returned, from the kernel; it must be durable elsewhere."""
        assert self._swapped, "forget() follows a swap() by the same process"
        self._other(self._running_bitmap()).clear()
        self._swapped = False
        if self.fresh:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self._folder}/fresh")
            self.fresh = False

    def peek(self) -> BlockSet:
        """All blocks not yet forgotten, those of the running epoch with them; clears nothing."""
        found = self._bitmaps[0].read()
        found |= self._bitmaps[1].read()
        found |= self._carried
        self._check_lost()
        return found

    def peek_running(self) -> BlockSet:
        """The blocks of the running epoch, with those in flight when it began; clears nothing."""
        found = self._running_bitmap().read()
        found |= self._carried
        self._check_lost()
        return found

    def close(self) -> None:
        """Let go; the kernel goes on tracking. The tracker must not be used any more."""
        self._opened.close()

    def remove(self) -> None:
        """Stop tracking this disk; with the machine's last disk its program goes as well."""
        self.close()
        with _pins_changed(self._machine_folder):
            _remove_disk(self._machine_folder, self._folder)
            if not _disk_folders(self._machine_folder):
                _remove_machine(self._machine_folder)

    def _still_in_flight(self) -> BlockSet:
        """Blocks of requests that were under way at a swap just made: they belong to both epochs.

        Some may have ended untold. If the kernel's own count says that nothing is under way now,
        all of them have, and what they wrote is there to be read.
        """
        found = BlockSet(self._block_count)
        for raw in libbpf.entries(self._flights, _FLIGHT.size, FLIGHTS_MAX):
            dev, _, first, last = _FLIGHT.unpack(raw)
            if dev == self._dev and first < self._block_count:
                found.add_run(first, min(last, self._block_count - 1) - first + 1)
        if found and self._nothing_is_under_way():
            found.clear()
        return found

    def _nothing_is_under_way(self) -> bool:
        """Whether the kernel says so; where it does not count, something may always be."""
        with open(self._counts_path, encoding="ascii") as file:
            counts = int(file.read())
        with open(self._in_flight_path, encoding="ascii") as file:
            writes = int(file.read().split()[1])
        return bool(counts) and not writes

    def _running_bitmap(self) -> _Bitmap:
        running_id = libbpf.lookup(self._disks, self._dev, 4)
        for bitmap in self._bitmaps:
            if bitmap.map_id == running_id:
                return bitmap
        raise TrackingError(
            f"the pins in {self._folder} no longer track {self._path}",
            hint="somebody removed or replaced them: restart the agent; the disk needs a resync",
        )

    def _other(self, running: _Bitmap) -> _Bitmap:
        return self._bitmaps[1 if running is self._bitmaps[0] else 0]

    def _check_lost(self) -> None:
        lost = libbpf.lookup(self._lost, self._dev, 8)
        if lost is None or lost or any(bitmap.is_overrun() for bitmap in self._bitmaps):
            raise TrackingError(
                f"changes of {self._path} were missed: {lost or 'some'} requests lie past its "
                f"{self._block_count} blocks or went around the block layer",
                hint="the disk was resized or written by pass-through commands: it needs a resync",
            )


class _Bitmap:
    """One pinned bitmap, mapped into memory: the kernel's own pages."""

    def __init__(self, opened: contextlib.ExitStack, path: str, block_count: int) -> None:
        self.fd = _opened_pin(opened, path)
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
    with _pins_changed(f"{ROOT}/{machine}"):
        _remove_machine(f"{ROOT}/{machine}")


@contextlib.contextmanager
def _pins_changed(machine_folder: str) -> Iterator[None]:
    """Around changes of pins: one at a time, the system's refusals in words."""
    with _lock:
        try:
            yield
        except OSError as error:
            raise storage_error("change the tracker's pins in", machine_folder, error) from error


def _opened_pin(opened: contextlib.ExitStack, path: str) -> int:
    fd = libbpf.pinned(path)
    opened.callback(os.close, fd)
    return fd


def _bitmap_names(device: Device) -> list[str]:
    """The kernel's names of a disk's two bitmaps: its exact size, and which appearance it is.

    A map has no other room for what must still be true when it is adopted; 15 letters fit.
    """
    return [f"s{device.size_bytes:x}", f"d{device.identity.diskseq & (1 << 56) - 1:x}"]


def _fits(machine_folder: str, folder: str, device: Device) -> bool:
    """Whether whole pins are there, for this device in its size, that have lost nothing."""
    with contextlib.ExitStack() as opened:
        if not all(os.path.exists(f"{folder}/{name}") for name in "ab"):
            return False
        infos = [libbpf.map_info(_opened_pin(opened, f"{folder}/{name}")) for name in "ab"]
        disks = _opened_pin(opened, f"{machine_folder}/disks")
        lost = _opened_pin(opened, f"{machine_folder}/lost")
        running_id = libbpf.lookup(disks, device.dev, 4)
        return (
            [info.name for info in infos] == _bitmap_names(device)
            and running_id in [info.map_id for info in infos]
            and libbpf.lookup(lost, device.dev, 8) == 0
            and not any(
                _Bitmap(opened, f"{folder}/{name}", device.block_count).is_overrun()
                for name in "ab"
            )
        )


def _make_machine(machine_folder: str) -> None:
    """Load the program and pin it; the last link makes it whole."""
    _make_folder(machine_folder)
    with libbpf.loaded_object(PROGRAM) as handle:
        for name in MAPS:
            libbpf.pin(libbpf.map_of(handle, name), f"{machine_folder}/{name}")
        for name in PROGRAMS:
            libbpf.attach_and_pin(handle, name, f"{machine_folder}/{name}")


def _make_disk(machine_folder: str, folder: str, device: Device) -> None:
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
        libbpf.update_u64(_opened_pin(opened, f"{machine_folder}/lost"), device.dev, 0)
        disks = _opened_pin(opened, f"{machine_folder}/disks")
        libbpf.update_inner(disks, device.dev, made[0])


def _remove_disk(machine_folder: str, folder: str) -> None:
    """Take a disk's bitmaps out of ``disks``, under whichever device, then their pins."""
    if not os.path.isdir(folder):
        return
    with contextlib.ExitStack() as opened:
        ids = {
            libbpf.map_info(_opened_pin(opened, f"{folder}/{name}")).map_id
            for name in os.listdir(folder)
        }
        if os.path.exists(f"{machine_folder}/disks"):
            disks = _opened_pin(opened, f"{machine_folder}/disks")
            for dev in libbpf.keys(disks):
                if libbpf.lookup(disks, dev, 4) in ids:
                    libbpf.delete(disks, dev)
                    if os.path.exists(f"{machine_folder}/lost"):
                        lost = _opened_pin(opened, f"{machine_folder}/lost")
                        libbpf.delete(lost, dev)
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def _remove_machine(machine_folder: str) -> None:
    if not os.path.isdir(machine_folder):
        return
    # The links first: from then on it counts as half-made.
    for name in PROGRAMS:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{machine_folder}/{name}")
    for folder in _disk_folders(machine_folder):
        _remove_disk(machine_folder, folder)
    for name in os.listdir(machine_folder):
        os.unlink(f"{machine_folder}/{name}")
    os.rmdir(machine_folder)
    try:
        os.rmdir(ROOT)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
            raise


def _disk_folders(machine_folder: str) -> list[str]:
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


def _mount_bpffs() -> None:
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

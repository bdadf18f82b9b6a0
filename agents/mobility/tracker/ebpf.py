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
import os
import struct
from typing import TYPE_CHECKING

from agents.mobility.tracker import libbpf
from agents.mobility.tracker.pins import (
    MACHINE_PINS,
    ROOT,
    Bitmap,
    disk_folders,
    fits,
    lock,
    make_disk,
    make_machine,
    mount_bpffs,
    opened_pin,
    pins_changed,
    remove_disk,
    remove_pins,
)
from replication.block_set import BlockSet
from replication.errors import TrackingError

if TYPE_CHECKING:
    import uuid

    from agents.mobility.device import Device

FLIGHTS_MAX = 16384
_FLIGHT = struct.Struct("<IIQQ")
assert _FLIGHT.size == 24


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
            self._flights = opened_pin(opened, f"{self._machine_folder}/flights")
            self._disks = opened_pin(opened, f"{self._machine_folder}/disks")
            self._lost = opened_pin(opened, f"{self._machine_folder}/lost")
            self._bitmaps = tuple(
                Bitmap(opened, f"{self._folder}/{name}", self._block_count) for name in "ab"
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
        with pins_changed(f"{ROOT}/{machine}"):
            mount_bpffs()
            machine_folder = f"{ROOT}/{machine}"
            folder = f"{machine_folder}/{disk_index}"
            if not all(os.path.exists(f"{machine_folder}/{name}") for name in MACHINE_PINS):
                remove_pins(machine_folder)
                make_machine(machine_folder)
            if not fits(machine_folder, folder, device):
                remove_disk(machine_folder, folder)
                make_disk(machine_folder, folder, device)
            return cls(machine, disk_index, device)

    def swap(self) -> BlockSet:
        """Close the running epoch; returns its blocks and all that are not yet forgotten.

        Waits 7 to 40 ms for the kernel. Without a ``forget`` since the last ``swap`` the earlier
        blocks are returned again, now and by the next one. Raises TrackingError when changes were
        missed: the disk needs a resync, ``remove`` and ``attach`` begin anew.
        """
        with lock:
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
        with pins_changed(self._machine_folder):
            remove_disk(self._machine_folder, self._folder)
            if not disk_folders(self._machine_folder):
                remove_pins(self._machine_folder)

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

    def _running_bitmap(self) -> Bitmap:
        running_id = libbpf.lookup(self._disks, self._dev, 4)
        for bitmap in self._bitmaps:
            if bitmap.map_id == running_id:
                return bitmap
        raise TrackingError(
            f"the pins in {self._folder} no longer track {self._path}",
            hint="somebody removed or replaced them: restart the agent; the disk needs a resync",
        )

    def _other(self, running: Bitmap) -> Bitmap:
        return self._bitmaps[1 if running is self._bitmaps[0] else 0]

    def _check_lost(self) -> None:
        lost = libbpf.lookup(self._lost, self._dev, 8)
        if lost is None or lost or any(bitmap.is_overrun() for bitmap in self._bitmaps):
            raise TrackingError(
                f"changes of {self._path} were missed: {lost or 'some'} requests lie past its "
                f"{self._block_count} blocks or went around the block layer",
                hint="the disk was resized or written by pass-through commands: it needs a resync",
            )

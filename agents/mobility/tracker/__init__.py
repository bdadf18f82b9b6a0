"""Tracking: which blocks of a disk have changed. ARCHITECTURE.md §4.

Two ways behind one protocol: ``ebpf`` (the kernel tells every change) and ``scan`` (changes are
found by checksums; slower, and never a point in time).
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from agents.mobility.device import Named
    from replication.block_set import BlockSet

KERNEL_MIN = (5, 17)
"""The first Linux with bpf_loop."""

KERNEL_TYPES = "/sys/kernel/btf/vmlinux"
"""The kernel's description of its own types, by which the program finds its way."""


class Tracker(Protocol):
    """The changes of one disk, in epochs. For one thread at a time.

    A caller's round: ``swap()``, make the blocks durable in its own state, ``forget()``. Killed
    between any two steps it loses nothing: what was not forgotten is told again.

    ``fresh``: nothing is known of changes before this attachment, so the disk needs a resync. It
    stays True for later processes too until the first ``forget()``: record the interruption
    durably before that.
    """

    fresh: bool

    def swap(self) -> BlockSet:
        """Close the running epoch; its blocks, and those of earlier ones not yet forgotten."""

    def forget(self) -> None:
        """Drop what the last ``swap`` returned; only after it has been made durable."""

    def peek(self) -> BlockSet:
        """All blocks that are not yet forgotten, the running epoch's with them."""

    def peek_running(self) -> BlockSet:
        """The blocks of the running epoch, which the next ``swap`` returns."""

    def close(self) -> None:
        """Let go; tracking goes on without the process where the way can do so."""

    def remove(self) -> None:
        """Stop tracking this disk and leave nothing of it behind."""


def reason_untrackable(device: Named) -> str | None:
    """Why the kernel cannot tell this disk's changes, in words for the operator; None if it can."""
    queue = f"/sys/block/{device.name}"
    release = platform.release().split("-")[0].split(".")
    if tuple(int(part) for part in release[:2]) < KERNEL_MIN:
        wanted = ".".join(map(str, KERNEL_MIN))
        return f"the kernel {platform.release()} is too old: tracking needs {wanted} or newer"
    if not os.path.exists(KERNEL_TYPES):
        return (
            f"the kernel does not describe its types ({KERNEL_TYPES} is missing): "
            "it is built without CONFIG_DEBUG_INFO_BTF"
        )
    if _is_locked_down():
        return "the kernel is locked down (confidentiality), which forbids tracing programs"
    if not os.path.isdir(f"{queue}/mq"):
        # Bio-based drivers complete no requests, so their changes are never told.
        kind = "a device mapper volume" if os.path.isdir(f"{queue}/dm") else "stacked or in memory"
        kind = "a software RAID" if os.path.isdir(f"{queue}/md") else kind
        below = sorted(os.listdir(f"{queue}/slaves")) if os.path.isdir(f"{queue}/slaves") else []
        instead = f"; protect the disks below it instead: {', '.join(below)}" if below else ""
        return f"{device.path} is {kind}: its driver completes no requests{instead}"
    with open(f"{queue}/queue/zoned") as file:
        zoned = file.read().strip()
    if zoned != "none":
        return f"{device.path} is a zoned disk ({zoned}), which is not supported"
    return None


def _is_locked_down() -> bool:
    try:
        with open("/sys/kernel/security/lockdown") as file:
            return "[confidentiality]" in file.read()
    except OSError:  # built without lockdown, or securityfs is not mounted
        return False

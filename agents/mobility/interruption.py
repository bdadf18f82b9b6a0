"""Whether what the trackers know joins on to what the state knows, disk by disk.

A pure look at both. Where they do not join on, changes may have gone untold: what is at the second
site cannot be reached by changes any more, and the machine needs a resync.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from agents.mobility.device import DeviceIdentity
from agents.mobility.source import SourceDisk
from agents.mobility.stream_state import StreamStateFile
from agents.mobility.tracker.scan import ScanTracker
from replication.control.report import ResyncCause


@dataclass(frozen=True, slots=True)
class Interruption:
    """Why tracking does not join on, as a code and in words."""

    cause: ResyncCause
    reason: str


def find_interruption(disks: Sequence[SourceDisk], state: StreamStateFile) -> Interruption | None:
    """The first that is found; None when all disks that the state knows were tracked all along.

    A disk that the state does not know yet is none: all of it is to do.
    """
    known = state.position.identities
    found = (
        _of_disk(disk, known[disk.index], whole=_is_whole(disk, state))
        for disk in disks
        if disk.index in known
    )
    return next((interruption for interruption in found if interruption is not None), None)


def _is_whole(disk: SourceDisk, state: StreamStateFile) -> bool:
    """Whether all of the disk is to do: then nothing depends on what the tracker does not know.

    Not while a commit is pending: should it have been taken, its blocks are done.
    """
    todo = state.todo.get(disk.index)
    is_full = todo is not None and len(todo) == disk.block_count
    return is_full and state.position.pending is None


def _of_disk(disk: SourceDisk, then: DeviceIdentity, *, whole: bool) -> Interruption | None:
    now = disk.device.identity
    name = disk.shape.name
    if now.size_bytes != then.size_bytes:
        return Interruption(
            ResyncCause.DISK_RESIZED,
            f"{name} was resized from {then.size_bytes} to {now.size_bytes} bytes",
        )
    if isinstance(disk.tracker, ScanTracker):
        if disk.tracker.fresh and not whole:
            return Interruption(ResyncCause.TRACKING_LOST, f"the digests of {name} are gone")
        return None
    if now.boot_id != then.boot_id:
        return Interruption(
            ResyncCause.UNCLEAN_SHUTDOWN,
            "the machine was started anew; changes before that are not known",
        )
    if now != then:
        return Interruption(ResyncCause.DISKS_CHANGED, f"{name} was detached or is another device")
    if disk.tracker.fresh and not whole:
        return Interruption(ResyncCause.TRACKING_LOST, f"tracking of {name} was lost")
    return None

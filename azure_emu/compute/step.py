"""What a VM needs next: from how it is and how it should be, one step at a time.

Pure: whoever asks has looked, and looks again after each step. Each step may be taken again.
"""

from dataclasses import dataclass
from enum import Enum, auto

from replication.control.recovery import VmPower, VmState


class Step(Enum):
    """REST: nothing is to be done until something changes."""

    MAKE_DISKS = auto()
    CHOOSE_GUEST = auto()
    START = auto()
    RESUME = auto()
    KILL = auto()
    AWAIT_SOURCE = auto()
    AWAIT_ROOM = auto()
    READ_CONSOLE = auto()
    GIVE_UP = auto()
    SEND_EVIDENCE = auto()
    SHUT_DOWN = auto()
    FORGET_BOOT = auto()
    STREAM = auto()
    MAKE_INDEPENDENT = auto()
    REMOVE = auto()
    REST = auto()


class Process(Enum):
    """How the VM's process is. HALTED: its guest has switched itself off, or ended.

    STUCK: its CPUs were stopped by an error of a disk, or of the accelerator; or its monitor is
           silent and the process is to end.
    FULL: they were stopped because a write found no room.
    """

    NONE = auto()
    RUNNING = auto()
    HALTED = auto()
    STUCK = auto()
    FULL = auto()


STARTS_MAX = 3
"""So often in a row a VM is started that gives no answer and ends."""


@dataclass(frozen=True, slots=True)
class Seen:
    """How a VM is.

    started:   the record says that it was started and not switched off since.
    answered:  this boot's check has ended, whichever way.
    failed:    this boot was given up.
    overdue:   the time for the check is over.
    own:       the guest is the disk's own, and not the recovery guest.
    readable:  all that the disks stand on can be read.
    room:      there is room for what the VM writes.
    """

    disks: bool
    guest_chosen: bool
    process: Process
    started: bool = False
    answered: bool = False
    failed: bool = False
    overdue: bool = False
    starts: int = 0
    own: bool = False
    readable: bool = True
    room: bool = True
    independent: bool = False
    evidence_due: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a VM should be."""

    power: VmPower
    independent: bool = False
    removed: bool = False


def next_step(seen: Seen, wanted: Wanted) -> Step:
    """The one step that comes next."""
    if wanted.removed:
        if seen.process is not Process.NONE:
            return Step.KILL
        return Step.SEND_EVIDENCE if seen.evidence_due else Step.REMOVE
    if not seen.disks:
        return Step.REST if seen.failed else Step.MAKE_DISKS
    if wanted.power is not VmPower.ON:
        return _towards_off(seen, wanted)
    if not seen.guest_chosen:
        return Step.CHOOSE_GUEST
    return _towards_up(seen, wanted)


def _towards_off(seen: Seen, wanted: Wanted) -> Step:
    if seen.process in (Process.HALTED, Process.STUCK, Process.FULL):
        return Step.KILL
    if seen.process is Process.RUNNING:
        return Step.SHUT_DOWN
    if seen.evidence_due:
        return Step.SEND_EVIDENCE
    if seen.started:
        return Step.FORGET_BOOT
    if wanted.independent and not seen.independent:
        return Step.MAKE_INDEPENDENT if seen.readable else Step.AWAIT_SOURCE
    return Step.REST


def _towards_up(seen: Seen, wanted: Wanted) -> Step:
    if seen.process is Process.STUCK:
        return Step.KILL
    if seen.process is Process.FULL:
        return Step.RESUME if seen.room else Step.AWAIT_ROOM
    if seen.failed:
        if seen.evidence_due:
            return Step.SEND_EVIDENCE
        given_up = seen.process is not Process.NONE and not seen.own
        return Step.KILL if given_up else Step.REST
    if seen.process is Process.NONE:
        if not seen.readable:
            return Step.AWAIT_SOURCE
        return Step.GIVE_UP if seen.starts >= STARTS_MAX else Step.START
    if not seen.answered:
        if seen.process is Process.HALTED or seen.overdue:
            return Step.GIVE_UP
        return Step.READ_CONSOLE
    if seen.evidence_due:
        return Step.SEND_EVIDENCE
    if seen.process is Process.RUNNING and wanted.independent and not seen.independent:
        return Step.STREAM
    return Step.REST


def state_of(seen: Seen, wanted: Wanted, *, passed: bool) -> VmState:
    """What is told of it. ``passed``: the check of this boot has."""
    if not seen.disks:
        return VmState.FAILED if seen.failed else VmState.PREPARING
    if wanted.power is VmPower.DISKS and seen.process is Process.NONE:
        return VmState.DISKS_READY
    if wanted.power is VmPower.OFF and seen.process is Process.NONE:
        return VmState.STOPPED
    if seen.failed or (seen.answered and not passed):
        return VmState.FAILED
    if seen.answered and seen.process is Process.HALTED:
        return VmState.STOPPED
    if seen.answered and seen.process is Process.RUNNING:
        return VmState.UP
    return VmState.STARTING

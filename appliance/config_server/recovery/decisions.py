"""What applier and compute node answer, and what follows from it: pure.

Source: docs/RECOVERY.md §2 to §4.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from appliance.config_server.recovery.run import FailoverKind, FailoverState, RunMachine
from replication.control.recovery import (
    HeldPoint,
    PointChoice,
    SourceDisk,
    VmReport,
    VmState,
)
from replication.control.report import StoreReport

CHECK_MARGIN_SECONDS = 60
"""For the start of the VM and the way of its report, beside what the check itself may take."""

COPY_STILL_SECONDS_MAX = 3600
"""How long the copy of a committed VM's disks may stand still."""

POINT_CHARACTERS_MAX = 255
CONSISTENCY_CHARACTERS_MAX = 64
PATH_CHARACTERS_MAX = 1900
"""Of folder and point; a disk's file name comes after them."""

_SECOND_NS = 10**9
_SPACE = 0x20
_NOT_IN_A_PATH = frozenset({"", ".", ".."})


@dataclass(frozen=True, slots=True)
class Wait:
    """Not yet. ``note``: what for."""

    note: str


@dataclass(frozen=True, slots=True)
class Good:
    """It is as it should be."""


@dataclass(frozen=True, slots=True)
class Bad:
    """It will not do. In the words of the API's errors."""

    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Instead:
    """What was asked for takes too long: another choice is to be held."""

    choice: PointChoice


@dataclass(frozen=True, slots=True)
class Stamp:
    """Of a changeset; they are ordered as they were made."""

    generation: int = 0
    number: int = 0

    def __lt__(self, other: "Stamp") -> bool:
        return (self.generation, self.number) < (other.generation, other.number)


def judge_store(
    store: StoreReport | None, waited_ns: int, answer_ns: int, final: Stamp | None = None
) -> Wait | Good | Bad:
    """Whether the applier knows of nothing that is wrong in a machine's store: a planned failover's
    point would have it, and its source could not send it any more.

    final: the last changeset, if there is one: what that has not mended stays as it is.
    """
    if store is None or not (store.lost or store.open_repairs):
        return Good()
    noun = "run of blocks is" if store.open_repairs == 1 else "runs of blocks are"
    why = f"{store.open_repairs} {noun} wrong there until the source sends them again"
    if store.lost:
        why = f"only a resync helps: {store.lost}"
    is_applied = final is not None and not Stamp(store.generation, store.applied) < final
    if is_applied or waited_ns > answer_ns:
        return Bad(
            "not_whole",
            f"the second site does not have all of the machine: {why}",
            "see the applier's health, then ask again; or fail over unplanned, to an older point",
        )
    return Wait(f"waits for repairs at the second site: {why}; {_seconds(answer_ns)} at most")


@dataclass(frozen=True, slots=True)
class HoldView:
    """A hold that is waited for.

    name: what people call the machine.
    waited_ns: since it was asked for. wait_seconds: for `latest`. answer_ns: what a node has to
    answer. final: the very changeset that the point must be of; none: whatever it is.
    """

    machine: uuid.UUID
    name: str
    choice: str
    waited_ns: int
    wait_seconds: int
    answer_ns: int
    final: Stamp | None = None


def judge_hold(view: HoldView, held: HeldPoint | None) -> Wait | Good | Bad | Instead:
    """What becomes of a hold that the applier says this of; None: nothing yet.

    `latest` is waited for so long as was asked, then what is processed is taken; the last changeset
    of a planned failover is what no other point can replace.
    """
    if held is not None and held.state == "held":
        return _judge_held(view, held)
    if held is not None and held.state == "refused":
        return Bad(
            "point_refused",
            f"the applier cannot hold the point {view.choice}: {held.reason or 'it says not why'}",
            f"`understudy points {view.name}` lists those that there are",
        )
    is_latest = view.choice == PointChoice.LATEST
    waits_ns = view.wait_seconds * _SECOND_NS if is_latest else 0
    if view.final is None and is_latest and view.waited_ns > waits_ns and held is not None:
        return Instead(PointChoice.LATEST_PROCESSED)
    if view.waited_ns > waits_ns + view.answer_ns:
        return Bad(
            "no_answer",
            f"the applier did not hold the point {view.choice}",
            "see that it runs and reaches the config server, then ask again",
        )
    if held is None:
        return Wait(f"waits for the applier, {_seconds(waits_ns + view.answer_ns)} at most")
    why = held.reason or "what is durable is still to be applied"
    if is_latest and view.final is None:
        bound = f"after {_seconds(waits_ns)} what is processed is taken"
    else:
        bound = f"{_seconds(waits_ns + view.answer_ns)} at most"
    return Wait(f"waits for the applier: {why}; {bound}")


def _judge_held(view: HoldView, held: HeldPoint) -> Good | Bad:
    if not _is_storable(held):
        return Bad(
            "point_wrong",
            "the applier holds a point whose name, folder or consistency is too long or has "
            "control characters: nothing can be made from that",
            "this is a defect of the applier: see its log",
        )
    if held.machine != view.machine or not held.disks or not _is_below(held):
        return Bad(
            "point_wrong",
            f"the applier holds {held.folder}/{held.point} of machine {held.machine}, "
            f"disks: {len(held.disks)}; nothing can be made from that",
            "this is a defect of the applier: see its log",
        )
    if view.final is not None and view.final != Stamp(held.generation, held.number):
        return Bad(
            "not_the_last",
            f"the point is of changeset {held.generation}.{held.number}, the last one was "
            f"{view.final.generation}.{view.final.number}",
            "the source went on to write: ask again",
        )
    return Good()


def _is_storable(held: HeldPoint) -> bool:
    """Whether our columns, and the paths of a VM's order, take it."""
    return (
        len(held.point) <= POINT_CHARACTERS_MAX
        and len(held.consistency) <= CONSISTENCY_CHARACTERS_MAX
        and len(held.folder) + len(held.point) <= PATH_CHARACTERS_MAX
        and not any(ord(each) < _SPACE for each in held.point + held.folder + held.consistency)
    )


def _is_below(held: HeldPoint) -> bool:
    """Whether its files are below the folder of all points."""
    parts = [*held.folder.split("/"), *held.point.split("/")]
    return len(parts) > 1 and not _NOT_IN_A_PATH.intersection(parts)


def source_disks(held: HeldPoint) -> tuple[SourceDisk, ...]:
    """The files that a VM's disks are made over."""
    return tuple(
        SourceDisk(
            index=disk.index,
            name=disk.name,
            size_bytes=disk.size_bytes,
            source=f"{held.folder}/{held.point}/disk{disk.index}.img",
        )
        for disk in held.disks
    )


def judge_disks(report: VmReport | None, waited_ns: int, answer_ns: int) -> Wait | Good | Bad:
    """Whether a VM's disks are made."""
    if report is not None and report.state is VmState.FAILED:
        return _broken(report)
    if report is not None and report.state is not VmState.PREPARING:
        return Good()
    if waited_ns > answer_ns:
        return _silent("did not make the disks")
    return Wait(f"waits for the compute node to make the disks, {_seconds(answer_ns)} at most")


def judge_vm(
    report: VmReport | None, waited_ns: int, *, check_seconds_max: int, answer_ns: int
) -> Wait | Good | Bad:
    """Whether a VM that was switched on is up and has passed its check."""
    if report is None:
        if waited_ns > answer_ns:
            return _silent("said nothing of the virtual machine")
        return Wait(f"waits for the compute node, {_seconds(answer_ns)} at most")
    ran = report.state in (VmState.UP, VmState.FAILED)
    if ran and report.check is not None and not report.check.passed:
        return Bad(
            "check_failed",
            f"the virtual machine has started, but its check failed: {report.check.detail}",
            "its console tells more; another point may be better",
        )
    if report.state is VmState.FAILED:
        return _broken(report)
    if report.state is VmState.STOPPED:
        return Bad(
            "vm_stopped",
            f"the virtual machine stopped: {report.reason or 'no reason is known'}",
            "its console tells more",
        )
    if report.state is VmState.UP:
        return Good()
    seconds_max = check_seconds_max + CHECK_MARGIN_SECONDS
    if waited_ns > seconds_max * _SECOND_NS:
        return Bad(
            "check_late",
            f"the virtual machine is not up within {check_seconds_max} s; it is {report.state}",
            "its console tells more; allow it more time, or give it more processors",
        )
    return Wait(f"the virtual machine is {report.state}; it has {seconds_max} s in all")


def judge_off(report: VmReport | None) -> Wait | Good:
    """Whether a VM that was switched off is; None: it is gone. One that FAILED may still run."""
    if report is not None and report.state not in (VmState.STOPPED, VmState.DISKS_READY):
        return Wait("waits for the virtual machine of the old point to be off")
    return Good()


@dataclass(frozen=True, slots=True)
class CopyView:
    """A VM whose disks are to stand alone.

    silent_ns: since its compute node was heard. still_ns: since the share last moved. answer_ns:
    what a node has to answer.
    """

    silent_ns: int
    still_ns: int
    answer_ns: int


def judge_copy(view: CopyView, report: VmReport | None) -> Wait | Good | Bad:
    """Whether a VM's disks stand alone. It may take hours, while it moves."""
    if report is not None and report.independent:
        return Good()
    if view.silent_ns > view.answer_ns:
        return _silent(f"was not heard for {_seconds(view.silent_ns)}; the copy of the disks")
    share = report.independent_share if report is not None else 0.0
    why = f": {report.reason}" if report is not None and report.reason else ""
    if view.still_ns > COPY_STILL_SECONDS_MAX * _SECOND_NS:
        return Bad(
            "no_progress",
            f"the copy of the disks has not moved for {_seconds(view.still_ns)}, at {share:.0%}"
            f"{why}",
            "mend what keeps it: the compute node's disk, the applier; it goes on by itself, and "
            "the failover can be committed again",
        )
    return Wait(
        f"{share:.0%} of the disks stand alone{why}; as long as it moves within "
        f"{COPY_STILL_SECONDS_MAX} s"
    )


def _seconds(nanoseconds: int) -> str:
    return f"{nanoseconds / _SECOND_NS:.0f} s"


def _broken(report: VmReport) -> Bad:
    return Bad(
        "vm_failed",
        f"the compute node cannot make the virtual machine: {report.reason or 'it says not why'}",
        "mend what it names, then ask again",
    )


def _silent(what: str) -> Bad:
    return Bad(
        "no_answer",
        f"the compute node {what}",
        "see that it runs and reaches the config server, then ask again",
    )


def hold_is_needed(
    vms: Iterable[tuple[bool, bool]], state: FailoverState, *, has_job: bool
) -> bool:
    """Whether a failover's hold must stay: while a VM reads from the point, or will.

    vms: those made from it: whether each is gone, and whether its disks stand alone.
    """
    known = list(vms)
    if known:
        return any(not is_gone and not is_independent for is_gone, is_independent in known)
    return has_job and state in (FailoverState.STARTING, FailoverState.UP)


def settled_state(state: FailoverState, vms_gone: Iterable[bool]) -> FailoverState | None:
    """What a failover that is to go has become when all its VMs are gone; None: nothing new."""
    ends = {
        FailoverState.CLEANING: FailoverState.CLEANED,
        FailoverState.CANCELLING: FailoverState.CANCELLED,
    }
    return ends.get(state) if all(vms_gone) else None


def rto_seconds(asked_ns: int, up_ns: int) -> float | None:
    """From the request to the VM being up; none while it is not."""
    return max(0, up_ns - asked_ns) / _SECOND_NS if up_ns else None


def rpo_seconds(asked_source_ns: int, point_ns: int) -> float | None:
    """What was lost: the request's time less the point's, both by the source's clock."""
    if not asked_source_ns or not point_ns:
        return None
    return max(0, asked_source_ns - point_ns) / _SECOND_NS


def vm_name(machine: str, kind: FailoverKind) -> str:
    """As people see it at the compute node; a test's tells that it is one."""
    return f"{machine}-test" if kind is FailoverKind.TEST else machine


def point_of(kind: FailoverKind, machine: RunMachine) -> str:
    """A planned failover's point is what was written last, whatever else was asked for."""
    return PointChoice.LATEST.value if kind is FailoverKind.PLANNED else machine.point

"""Which process server and applier a machine gets, and which of its disks: pure.

Source: docs/CONTROL.md §6, §9.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from replication.control.assignment import MACHINE_COUNT_MAX
from replication.control.report import BlockDevice
from replication.errors import InputError

DISKS_MAX = 64


class PlacementError(InputError):
    """What a machine would be protected by, or the disks that were chosen, will not do."""

    code = "placement"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A process server or an applier.

    trouble: why it takes no more machines just now; empty when it does.
    load:    the number of its machines, then what it has stored of what it may, from 0 to 1.
    assigned_count: machines that its assignment names, the one to be placed aside.
    is_live: whether it has a good certificate; else its name names it no more.
    """

    id: uuid.UUID
    name: str
    machine_count: int = 0
    fill_share: float = 0.0
    trouble: str = ""
    is_live: bool = True
    assigned_count: int = 0

    @property
    def refusal(self) -> str:
        """Why it does not get the machine; empty when it may."""
        if self.trouble or self.assigned_count < MACHINE_COUNT_MAX:
            return self.trouble
        return f"it has {self.assigned_count} machines, and can have {MACHINE_COUNT_MAX}"


@dataclass(frozen=True, slots=True)
class ChosenDisk:
    """A disk with its number in the stream."""

    index: int
    device: BlockDevice
    excluded: bool


def choose(candidates: Iterable[Candidate], asked: str | None, *, what: str) -> Candidate:
    """The one that is asked for by id, or by name if no id fits, else the least loaded healthy one.

    what: "process server" or "applier". Raises PlacementError.
    """
    known = sorted(candidates, key=lambda each: (each.machine_count, each.fill_share, each.name))
    if asked is not None:
        found = [each for each in known if asked.lower() == str(each.id)]
        found = found or [each for each in known if each.is_live and asked == each.name]
        if len(found) != 1:
            raise PlacementError(
                f"there is {'no' if not found else 'more than one'} {what} {asked}",
                hint=f"enrolled: {', '.join(each.name for each in known) or 'none'}",
            )
        if found[0].refusal:
            raise PlacementError(f"the {what} {found[0].name} cannot be used: {found[0].refusal}")
        return found[0]
    healthy = [each for each in known if not each.refusal]
    if not known:
        raise PlacementError(f"no {what} is enrolled", hint=f"enrol one: a {what} is needed")
    if not healthy:
        told = "; ".join(f"{each.name}: {each.refusal}" for each in known)
        raise PlacementError(f"no {what} can take the machine: {told}")
    return healthy[0]


def choose_disks(
    devices: tuple[BlockDevice, ...], asked: tuple[str, ...] | None, known: dict[str, int]
) -> tuple[ChosenDisk, ...]:
    """All devices with their numbers; those that were not asked for are excluded.

    asked: devices by path or id; None: all of them.
    known: numbers that disks of this machine have or had, by id; they keep them.
    Raises PlacementError for a disk that cannot be tracked, is not there, or is missed.
    """
    if not devices:
        raise PlacementError("the agent reports no disks", hint="look at the agent's log")
    chosen = set()
    for name in asked if asked is not None else [device.id for device in devices]:
        found = find_device(devices, name)
        if found.reason:
            raise PlacementError(
                f"{found.device} cannot be tracked: {found.reason}",
                hint="name the disks to protect with disks, without this one",
            )
        chosen.add(found.id)
    if not chosen:
        raise PlacementError("at least one disk must be protected")
    if len(chosen) > DISKS_MAX:
        raise PlacementError(f"{len(chosen)} disks are more than {DISKS_MAX}")
    for device in devices:
        if device.is_system and device.id not in chosen:
            raise PlacementError(
                f"{device.device} is the system disk and cannot be left out",
                hint="the machine could not be started at the second site without it",
            )
    numbers = dict(known)
    for device in sorted(devices, key=lambda each: each.id not in chosen):
        numbers.setdefault(device.id, max(numbers.values(), default=-1) + 1)
    return tuple(
        sorted(
            (ChosenDisk(numbers[each.id], each, each.id not in chosen) for each in devices),
            key=lambda disk: disk.index,
        )
    )


def find_device(devices: tuple[BlockDevice, ...], name: str) -> BlockDevice:
    """By path or id. Raises PlacementError that names those that are there."""
    for device in devices:
        if name in (device.id, device.device):
            return device
    raise PlacementError(
        f"the machine has no disk {name}",
        hint=f"it reports {', '.join(device.device for device in devices)}",
    )

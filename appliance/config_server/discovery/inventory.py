"""A vCenter's machines as values: made of what its property collector says, compared, matched.

Nothing here asks or writes anything.

Source: vSphere Web Services API, PropertyCollector and VirtualMachine; DMTF DSP0134 §7.2.1 (UUID).
"""

import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import unquote

NAME_CHARS_MAX = 255
ADDRESS_COUNT_MAX = 64
PATH_DEPTH_MAX = 64
_POWER = {"poweredOn": "on", "poweredOff": "off", "suspended": "suspended"}
_NO_IDENTITY = frozenset({uuid.UUID(int=0), uuid.UUID(int=(1 << 128) - 1)})


@dataclass(frozen=True, slots=True)
class VirtualDisk:
    """A disk of a VM.

    key:   the device's number in the VM; stays while the disk stays.
    label: as people see it: ``Hard disk 1``.
    path:  the backing file: ``[datastore1] web-01/root.vmdk``; empty for a raw mapping without one.
    """

    key: int
    label: str
    path: str
    capacity_bytes: int
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Vm:
    """What a vCenter says of a virtual machine.

    moid:      its name in this vCenter alone; another one has the same names.
    folder:    path of the folder that holds it: ``/Datacenter/Production``.
    bios_uuid: None when it is not known (the VM is inaccessible) or says nothing (all 0, all F).
    power:     ``on``, ``off``, ``suspended`` or ``unknown``.
    tools:     how VMware Tools are: ``guestToolsRunning``, …; empty when not known.
    """

    moid: str
    name: str
    folder: str = ""
    host: str = ""
    bios_uuid: uuid.UUID | None = None
    power: str = "unknown"
    guest_system: str = ""
    hostname: str = ""
    addresses: tuple[str, ...] = ()
    tools: str = ""
    disks: tuple[VirtualDisk, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """What a VM's place is told by. ``kind``: ``Folder``, ``Datacenter`` or ``HostSystem``."""

    kind: str
    name: str
    parent: str = ""


def place_from(kind: str, properties: Mapping[str, Any]) -> Place:
    """A place from its properties."""
    return Place(kind, _name(properties.get("name")), _moid(properties.get("parent")))


def vm_from(moid: str, properties: Mapping[str, Any], places: Mapping[str, Place]) -> Vm:
    """A VM from the properties that were there; one that is missing is not known.

    properties: by path, as ``config.hardware.device``.
    places:     folders, datacenters and hosts by moid.
    """
    get = properties.get
    host = get("runtime.host")
    parent = get("parent")
    return Vm(
        moid=moid,
        name=_name(get("name")) or moid,
        folder=folder_path(_moid(parent), places),
        host=places[_moid(host)].name if _moid(host) in places else "",
        bios_uuid=bios_uuid_from(get("config.uuid")),
        power=_POWER.get(str(get("runtime.powerState")), "unknown"),
        guest_system=_text(get("config.guestFullName")) or _text(get("config.guestId")),
        hostname=_text(get("guest.hostName")),
        addresses=_addresses(get("guest.net"), get("guest.ipAddress")),
        tools=_text(get("guest.toolsRunningStatus")),
        disks=_disks(get("config.hardware.device")),
    )


def folder_path(moid: str, places: Mapping[str, Place]) -> str:
    """The path of a folder from the datacenter down.

    Left out are the root, and the folder ``vm`` in which each datacenter keeps its VMs: nobody
    sees them.
    """
    names: list[str] = []
    for _ in range(PATH_DEPTH_MAX):
        place = places.get(moid)
        if place is None or not place.parent:
            break
        above = places.get(place.parent)
        if not (place.name == "vm" and above is not None and above.kind == "Datacenter"):
            names.append(place.name)
        moid = place.parent
    return "".join(f"/{name}" for name in reversed(names))


def bios_uuid_from(text: Any) -> uuid.UUID | None:
    """The UUID that firmware tells the guest; None for none, a malformed one, all 0 or all F."""
    try:
        parsed = uuid.UUID(str(text)) if text else None
    except ValueError:
        return None
    return None if parsed in _NO_IDENTITY else parsed


def _text(value: Any) -> str:
    return str(value)[:NAME_CHARS_MAX] if value else ""


def _name(value: Any) -> str:
    r"""A name as people typed it: the API writes ``/``, ``\\`` and ``%`` as ``%2f`` and so on."""
    return unquote(_text(value))


def _moid(reference: Any) -> str:
    return str(getattr(reference, "_moId", "") or "")


def _addresses(adapters: Any, first: Any) -> tuple[str, ...]:
    """All addresses, the guest's primary one first, each once."""
    found = [str(first)] if first else []
    for adapter in adapters or ():
        found += [str(address) for address in adapter.ipAddress or ()]
    return tuple(dict.fromkeys(found))[:ADDRESS_COUNT_MAX]


def _disks(devices: Any) -> tuple[VirtualDisk, ...]:
    """The disks among all devices: what has a capacity in KB, which no other device has."""
    found = []
    for device in devices or ():
        kib = getattr(device, "capacityInKB", None)
        if kib is None:
            continue
        backing, info = device.backing, device.deviceInfo
        found.append(
            VirtualDisk(
                key=int(device.key),
                label=_text(getattr(info, "label", "")),
                path=str(getattr(backing, "fileName", "") or ""),
                capacity_bytes=int(getattr(device, "capacityInBytes", None) or kib * 1024),
                uuid=_text(getattr(backing, "uuid", "")),
            )
        )
    return tuple(sorted(found, key=lambda disk: disk.key))


class ChangeKind(StrEnum):
    """What happened to a VM between two views."""

    ADDED = "added"
    REMOVED = "removed"
    RENAMED = "renamed"
    MOVED = "moved"
    POWERED = "powered"
    DISKS = "disks"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Change:
    """One VM's changes; ``after`` is None for one that is gone, ``before`` for a new one."""

    moid: str
    kinds: frozenset[ChangeKind]
    before: Vm | None
    after: Vm | None


_KINDS: Mapping[ChangeKind, tuple[str, ...]] = {
    ChangeKind.RENAMED: ("name",),
    ChangeKind.MOVED: ("folder", "host"),
    ChangeKind.POWERED: ("power",),
    ChangeKind.DISKS: ("disks",),
    ChangeKind.CHANGED: ("bios_uuid", "guest_system", "hostname", "addresses", "tools"),
}


def compare(before: Mapping[str, Vm], after: Mapping[str, Vm]) -> tuple[Change, ...]:
    """What changed between two whole views, by moid; a VM that stayed as it was is not in it."""
    changes = []
    for moid in sorted(before.keys() | after.keys()):
        old, new = before.get(moid), after.get(moid)
        if kinds := _kinds(old, new):
            changes.append(Change(moid, kinds, old, new))
    return tuple(changes)


def _kinds(old: Vm | None, new: Vm | None) -> frozenset[ChangeKind]:
    if old is None:
        return frozenset({ChangeKind.ADDED})
    if new is None:
        return frozenset({ChangeKind.REMOVED})
    return frozenset(
        kind
        for kind, fields in _KINDS.items()
        if any(getattr(old, field) != getattr(new, field) for field in fields)
    )


@dataclass(frozen=True, slots=True)
class Identity:
    """What an enrolled machine and a VM are recognised by."""

    id: uuid.UUID
    bios_uuid: uuid.UUID | None
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Match:
    """The VM that a machine is. Where ``vm`` is None, ``reason`` says why."""

    vm: uuid.UUID | None
    reason: str = ""


def swapped(value: uuid.UUID) -> uuid.UUID:
    """The same bytes read with the first three fields in the other order.

    SMBIOS before 2.6 did not say which; guests and vCenter differ for old virtual hardware.
    """
    return uuid.UUID(bytes=value.bytes_le)


def match(machines: Iterable[Identity], vms: Iterable[Identity]) -> dict[uuid.UUID, Match]:
    """Which VM each machine is, by BIOS UUID in either byte order.

    The order as written goes first. Several VMs with one UUID (copies) are told apart by a name
    that fits exactly one of them, and several machines that fit one VM likewise; else there is no
    match: a wrong one would protect the wrong machine.
    """
    by_uuid: dict[uuid.UUID, list[Identity]] = defaultdict(list)
    for vm in vms:
        if vm.bios_uuid is not None and vm.bios_uuid not in _NO_IDENTITY:
            by_uuid[vm.bios_uuid].append(vm)
    found = {machine: _candidate(machine, by_uuid) for machine in machines}
    claims: dict[uuid.UUID, list[Identity]] = defaultdict(list)
    for machine, told in found.items():
        if told.vm is not None:
            claims[told.vm].append(machine)
    by_id = {vm.id: vm for group in by_uuid.values() for vm in group}
    for vm_id, rivals in claims.items():
        if len(rivals) > 1:
            named = _named(rivals, by_id[vm_id].names)
            for rival in rivals:
                if named is not rival:
                    found[rival] = Match(None, "another enrolled machine has the same BIOS UUID")
    return {machine.id: told for machine, told in found.items()}


def _candidate(machine: Identity, by_uuid: Mapping[uuid.UUID, Sequence[Identity]]) -> Match:
    if machine.bios_uuid is None or machine.bios_uuid in _NO_IDENTITY:
        return Match(None, "the machine has no BIOS UUID")
    for wanted in dict.fromkeys((machine.bios_uuid, swapped(machine.bios_uuid))):
        if candidates := by_uuid.get(wanted):
            if len(candidates) == 1:
                return Match(candidates[0].id)
            named = _named(candidates, machine.names)
            if named is not None:
                return Match(named.id)
            return Match(None, f"{len(candidates)} VMs have its BIOS UUID")
    return Match(None, "no VM has its BIOS UUID")


def _named(candidates: Sequence[Identity], names: Iterable[str]) -> Identity | None:
    """The only candidate that shares a name, None if there are none or several."""
    wanted = {_short(name) for name in names if name}
    fitting = [one for one in candidates if wanted & {_short(name) for name in one.names if name}]
    return fitting[0] if len(fitting) == 1 else None


def _short(name: str) -> str:
    return name.lower().partition(".")[0]

"""What the emulated vCenter is told when it starts: vcsim/fixture.go reads it."""

import zlib
from collections.abc import Iterable
from typing import Any

from vsphere_emu.config import Config, GuestConfig, Tls, VCenterConfig

NUMBER_FIRST = 1024
NUMBER_STEP = 16
NUMBER_SLOTS = 6000
"""So many places for moids: from NUMBER_FIRST, NUMBER_STEP apart, as each VM spends a few."""


def render(
    config: Config,
    vcenter: VCenterConfig,
    *,
    tls: Tls,
    folder: str,
    powered_on: Iterable[str],
    synthetic_folder: str,
) -> dict[str, Any]:
    """The fixture as JSON's values. It holds the password.

    folder:     of the datastore.
    powered_on: names of the guests that are on now.
    """
    on = set(powered_on)
    numbers = machine_numbers(guest.name for guest in config.guests)
    return {
        "listen": f"[{vcenter.host}]:{vcenter.port}"
        if ":" in vcenter.host
        else f"{vcenter.host}:{vcenter.port}",
        "user": vcenter.user,
        "password": vcenter.read_password(),
        "certificate": tls.certificate,
        "key": tls.key,
        "instance_uuid": str(vcenter.identity),
        "session_idle_seconds": vcenter.session_idle_seconds,
        "datacenter": vcenter.datacenter,
        "hosts": list(vcenter.esx_hosts),
        "datastore": {"name": config.datastore.name, "folder": folder},
        "machines": [
            _machine(guest, config.datastore.name, numbers[guest.name], is_on=guest.name in on)
            for guest in config.guests
        ],
        "synthetic_count": vcenter.synthetic_count,
        "synthetic_folder": synthetic_folder,
    }


def machine_numbers(names: Iterable[str]) -> dict[str, int]:
    """The number of each VM's moid. It follows from the name, so that it stays the same when the
    vCenter starts again without some other VM; only names that fall on one place give way.
    """
    taken: set[int] = set()
    numbers = {}
    for name in sorted(names):
        place = zlib.crc32(name.encode()) % NUMBER_SLOTS
        while place in taken:
            place = (place + 1) % NUMBER_SLOTS
        taken.add(place)
        numbers[name] = NUMBER_FIRST + place * NUMBER_STEP
    return numbers


def _machine(guest: GuestConfig, datastore: str, number: int, *, is_on: bool) -> dict[str, Any]:
    return {
        "name": guest.name,
        "number": number,
        "bios_uuid": str(guest.identity),
        "guest_system": guest.guest_system,
        "hostname": guest.hostname or guest.name,
        "folder": guest.folder,
        "is_on": is_on,
        "disks": [
            {
                "path": f"[{datastore}] {guest.name}/{disk.name}.vmdk",
                "size_bytes": disk.size_bytes,
            }
            for disk in guest.disks
        ],
        "adapters": [
            {
                "network": adapter.network,
                "mac": adapter.mac or "",
                "addresses": list(adapter.addresses),
            }
            for adapter in guest.adapters
        ],
    }

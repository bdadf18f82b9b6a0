"""What this machine is: the UUID by which a hypervisor knows it, its name, system and kernel.

Source: DMTF DSP0134 (SMBIOS) §7.2.1; os-release(5).
"""

import os
import re
import shlex
import uuid
from dataclasses import dataclass

DMI = "/sys/class/dmi/id"
OS_RELEASE = ("/etc/os-release", "/usr/lib/os-release")
_VMWARE_SERIAL = re.compile(r"VMware-((?:[0-9a-f]{2}[ -]?){16})", re.IGNORECASE)
_NO_UUIDS = (uuid.UUID(int=0), uuid.UUID(int=(1 << 128) - 1))
"""What firmware says that has none."""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """``bios_uuid``: None where the firmware tells none."""

    bios_uuid: uuid.UUID | None
    hostname: str
    system: str
    kernel: str


def parse_bios_uuid(product_uuid: str, product_serial: str) -> uuid.UUID | None:
    """The UUID as the hypervisor's management knows it.

    On VMware the serial number spells it out in vCenter's order of bytes; the field for the UUID
    has the first three groups reversed from hardware version 13 on.
    """
    spelled = _VMWARE_SERIAL.fullmatch(product_serial.strip())
    text = re.sub("[ -]", "", spelled[1]) if spelled else product_uuid.strip()
    try:
        found = uuid.UUID(text)
    except ValueError:
        return None
    return None if found in _NO_UUIDS else found


def parse_os_release(text: str) -> str:
    """The system's name for people, empty where none is given."""
    names = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key in ("PRETTY_NAME", "NAME"):
            try:
                names[key] = " ".join(shlex.split(value))
            except ValueError:  # quotes that do not end
                continue
    return names.get("PRETTY_NAME") or names.get("NAME", "")


def read_host(bios_uuid: uuid.UUID | None = None) -> HostFacts:
    """Look; ``bios_uuid`` counts in the place of the firmware's where it is given."""
    system = os.uname()
    told = bios_uuid or parse_bios_uuid(
        _text(f"{DMI}/product_uuid"), _text(f"{DMI}/product_serial")
    )
    names = (parse_os_release(_text(path)) for path in OS_RELEASE)
    return HostFacts(
        bios_uuid=told,
        hostname=system.nodename,
        system=next((name for name in names if name), system.sysname),
        kernel=system.release,
    )


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:  # no such firmware or file, or none that root may read
        return ""

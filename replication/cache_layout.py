"""Where what lies in the cache storage account.

A container holds CONTAINER_CHANGESETS successive changesets of one generation of one machine, so
that who knows a changeset's number knows its container; it is dropped whole when all in it is
applied. A changeset exists when its manifest does.

Source: FORMAT.md §7.
"""

import re
import uuid

from replication.bookmark import Stamp

CONTAINER_CHANGESETS = 64
CONTROL_CONTAINER = "understudy"
WAKE_QUEUE = "understudy-manifests"
SEGMENT_PREFIX = "segment/"
MANIFEST_PREFIX = "manifest/"

_CONTAINER = re.compile(r"[0-9a-f]{32}-g([0-9]{8,10})-([0-9]{12,18})")
_MANIFEST = re.compile(r"manifest/([0-9]{12,19})")


def machine_prefix(machine: uuid.UUID) -> str:
    """What the names of all containers of a machine begin with."""
    return f"{machine.hex}-"


def generation_prefix(machine: uuid.UUID, generation: int) -> str:
    return f"{machine_prefix(machine)}g{generation:08}-"


def container_name(machine: uuid.UUID, stamp: Stamp) -> str:
    """The container of a changeset: 56 characters of a-z, 0-9 and dashes."""
    part = stamp.number // CONTAINER_CHANGESETS
    return f"{generation_prefix(machine, stamp.generation)}{part:012}"


def container_last(name: str) -> Stamp | None:
    """The last changeset that a container of this name can hold; None for a foreign name."""
    found = _CONTAINER.fullmatch(name)
    if not found:
        return None
    generation, part = (int(digits) for digits in found.groups())
    last = Stamp(generation, (part + 1) * CONTAINER_CHANGESETS - 1)
    return last if container_name(uuid.UUID(name[:32]), last) == name else None


def segment_name(number: int, attempt: bytes, segment: int) -> str:
    """The blob of one segment. The attempt is in the name: what an abandoned attempt left
    behind can never stand where another one's segment belongs.
    """
    return f"{SEGMENT_PREFIX}{number:012}/{attempt.hex()}/{segment:06}"


def manifest_name(number: int) -> str:
    return f"{MANIFEST_PREFIX}{number:012}"


def manifest_number(name: str) -> int | None:
    """The changeset number of a manifest's blob; None for any other blob."""
    found = _MANIFEST.fullmatch(name)
    if not found:
        return None
    number = int(found[1])
    return number if manifest_name(number) == name else None


def watermark_name(machine: uuid.UUID) -> str:
    """Blob in CONTROL_CONTAINER: what the applier has applied, and what it asks for."""
    return f"watermark/{machine}"


def lease_name(machine: uuid.UUID) -> str:
    """Blob in CONTROL_CONTAINER whose lease says which applier owns the machine."""
    return f"lease/{machine}"

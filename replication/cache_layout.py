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
_SUMS_CONTAINER = re.compile(r"[0-9a-f]{32}-s([0-9]{8,10})")
_MANIFEST = re.compile(r"manifest/([0-9]{12,19})")
_SEGMENT = re.compile(r"segment/([0-9]{12,19})/([0-9a-f]{32})/([0-9]{6})")


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


def blob_number(name: str) -> int | None:
    """The changeset number of a manifest's or a segment's blob; None for any other blob."""
    found = _SEGMENT.fullmatch(name)
    if not found:
        return manifest_number(name)
    number = int(found[1])
    exact = segment_name(number, bytes.fromhex(found[2]), int(found[3]))
    return number if exact == name else None


def sums_container(machine: uuid.UUID, generation: int) -> str:
    """The container of the sums that a resync compares with; it goes when they are not needed."""
    return f"{machine_prefix(machine)}s{generation:08}"


def sums_generation(name: str) -> int | None:
    """The generation whose sums a container of this name holds; None for any other container."""
    found = _SUMS_CONTAINER.fullmatch(name)
    if not found:
        return None
    generation = int(found[1])
    return generation if sums_container(uuid.UUID(name[:32]), generation) == name else None


def sums_name(disk: int, level: int, part: int) -> str:
    """The blob of one part of a disk's sums."""
    return f"sums/{disk:02}/{level}/{part:08}"


def watermark_name(machine: uuid.UUID) -> str:
    """Blob in CONTROL_CONTAINER: what the applier has applied, and what it asks for."""
    return f"watermark/{machine}"


def lease_name(machine: uuid.UUID) -> str:
    """Blob in CONTROL_CONTAINER whose lease says which applier owns the machine."""
    return f"lease/{machine}"

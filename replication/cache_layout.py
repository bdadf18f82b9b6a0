"""Where what lies in the cache storage account.

A container holds CONTAINER_CHANGESETS successive changesets of one generation of one machine, so
that who knows a changeset's number knows its container; it is dropped whole when all in it is
applied. A changeset exists when its manifest does.

Source: FORMAT.md §7.
"""

import uuid

from replication.bookmark import Stamp

CONTAINER_CHANGESETS = 64
CONTROL_CONTAINER = "understudy"
WAKE_QUEUE = "understudy-manifests"
SEGMENT_PREFIX = "segment/"
MANIFEST_PREFIX = "manifest/"


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
    pieces = name.split("-")
    if len(pieces) != 3 or not pieces[1].startswith("g"):
        return None
    generation, part = pieces[1][1:], pieces[2]
    if not (generation.isdecimal() and part.isdecimal()):
        return None
    return Stamp(int(generation), (int(part) + 1) * CONTAINER_CHANGESETS - 1)


def segment_name(number: int, attempt: bytes, segment: int) -> str:
    """The blob of one segment. The attempt is in the name: what an abandoned attempt left
    behind can never stand where another one's segment belongs.
    """
    return f"{SEGMENT_PREFIX}{number:012}/{attempt.hex()}/{segment:06}"


def manifest_name(number: int) -> str:
    return f"{MANIFEST_PREFIX}{number:012}"


def manifest_number(name: str) -> int | None:
    """The changeset number of a manifest's blob; None for any other blob."""
    number = name.removeprefix(MANIFEST_PREFIX)
    return int(number) if name.startswith(MANIFEST_PREFIX) and number.isdecimal() else None


def watermark_name(machine: uuid.UUID) -> str:
    """Blob in CONTROL_CONTAINER: what the applier has applied, and what it asks for."""
    return f"watermark/{machine}"


def lease_name(machine: uuid.UUID) -> str:
    """Blob in CONTROL_CONTAINER whose lease says which applier owns the machine."""
    return f"lease/{machine}"

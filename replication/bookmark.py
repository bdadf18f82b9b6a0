"""The consistency point that closes a changeset.

Source: FORMAT.md §6 (the manifest carries it), docs/STORE.md (layers carry it).
"""

import uuid
from dataclasses import dataclass
from enum import Enum

from replication.errors import PeerError


class Consistency(Enum):
    """What a bookmark promises about the state of all disks of the machine at its instant."""

    NONE = "none"
    """Nothing: blocks were read at different instants."""

    CRASH = "crash"
    """The disks as a power cut at that instant would have left them, all at once."""

    APP = "app"
    """As CRASH, and the applications' own scripts had brought their data to rest before."""

    @property
    def restorable(self) -> bool:
        """Whether a recovery point can be made of it."""
        return self is not Consistency.NONE


@dataclass(frozen=True, slots=True, order=True)
class Stamp:
    """Which changeset of a machine: ordered by generation, then by number.

    generation: counts initial replications and resyncs, from 1.
    number:     the changeset's number within its generation, from 1; 0 stands for "none yet".
    """

    generation: int
    number: int

    def __str__(self) -> str:
        return f"{self.generation}.{self.number}"


NOTHING = Stamp(0, 0)
"""Before the first changeset of the first generation."""

GENERATION_LEAP_MAX = 1 << 16
"""Above what one knows a generation that others tell of is not believed to lie further.

Whoever writes watermarks could else use the numbers up with one.
"""


@dataclass(frozen=True, slots=True)
class Bookmark:
    """The point in time at which a changeset ends.

    stamp:       of the changeset that it closes.
    time_ns:     source's clock at that instant, nanoseconds since 1970-01-01 UTC.
    consistency: what it promises.
    reason:      why it promises less than was asked for; empty when it does not.
    """

    stamp: Stamp
    time_ns: int
    consistency: Consistency
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DiskShape:
    """One disk of a machine as a changeset finds it.

    index:      the number that frames use for the disk; stable for a machine.
    name:       what people call it, for example ``/dev/sdb`` or ``data``.
    size_bytes: a multiple of 512.
    """

    index: int
    name: str
    size_bytes: int


MachineId = uuid.UUID
"""A protected machine; also the name of its certificate and of its containers."""


def read_machine(text: str, where: str) -> uuid.UUID:
    """A machine's id in its one canonical form, lower case with dashes; PeerError otherwise."""
    try:
        machine = uuid.UUID(text)
    except ValueError as error:
        raise PeerError(f"{where}: {text!r:.80} is not a machine's id") from error
    if str(machine) != text:
        raise PeerError(f"{where}: {text!r:.80} is not a machine's id")
    return machine

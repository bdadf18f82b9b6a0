"""What applier and compute node are told and say of recovery: holds, points, virtual machines.

Source: docs/RECOVERY.md §2, §3.
"""

import base64
import binascii
import ipaddress
import uuid
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from replication.control.message import Message
from replication.control.value import Count, Seconds, Share, Text
from replication.errors import PeerError

HOLDS_MAX = 1024
POINTS_MAX = 4096
DISKS_MAX = 64
VMS_MAX = 1024
FILE_SYSTEMS_MAX = 256
SCRIPT_CHARACTERS_MAX = 65536
EVIDENCE_BYTES_MAX = 720 << 10
"""Of one console or screenshot; of a longer console its end."""

OneLine = Annotated[str, Field(max_length=2000, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Without control characters: it becomes part of a path."""


def _is_address(value: str) -> str:
    """Raises ValueError for what is no IP address, unless it is empty."""
    if value:
        ipaddress.ip_address(value)
    return value


Address = Annotated[str, Field(max_length=64), AfterValidator(_is_address)]
Script = Annotated[str, Field(max_length=SCRIPT_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]


class PointChoice(StrEnum):
    """Which point, when it is not named. LATEST waits until what is durable has been applied."""

    LATEST = "latest"
    LATEST_PROCESSED = "latest-processed"
    LATEST_APP_CONSISTENT = "latest-app-consistent"


class Hold(Message):
    """A point that stays, whatever retention says, for as long as this is in the assignment.

    choice:   a `PointChoice` or a point's name; resolved once, at the first moment that it can be.
    generation, number: of LATEST: nothing older is chosen; 0 and 0: whatever there is.
    until_ns: it stays at least so long, also when nobody asks for it any more (a lock); 0: no lock.
    """

    id: uuid.UUID
    machine: uuid.UUID
    choice: Text
    generation: Count = 0
    number: Count = 0
    until_ns: Count = 0


class PointDisk(Message):
    """A disk of a point."""

    index: Count
    name: Text
    size_bytes: Count


class HeldPoint(Message):
    """What became of a hold.

    state:  ``waiting`` for what is still to be applied; ``refused`` says why in ``reason``.
    folder: of the machine below the folder of all points; the disks are
            ``folder/point/disk<index>.img``.
    """

    id: uuid.UUID
    machine: uuid.UUID
    state: Literal["waiting", "held", "refused"]
    reason: Text = ""
    folder: OneLine = ""
    point: OneLine = ""
    position: Count = 0
    generation: Count = 0
    number: Count = 0
    time_ns: Count = 0
    consistency: Text = ""
    disks: Annotated[tuple[PointDisk, ...], Field(max_length=DISKS_MAX)] = ()


class ListedPoint(Message):
    """A recovery point for people to choose from. ``verified_ns``: 0 when it never was.

    locked_until_ns: cannot be deleted before; 0: no lock. held: something is made from it.
    """

    name: Text
    position: Count
    time_ns: Count
    applied_ns: Count = 0
    consistency: Text
    reason: Text = ""
    changed_bytes: Count = 0
    verified_ns: Count = 0
    held: bool = False
    locked_until_ns: Count = 0


class PointList(Message):
    """All recovery points of a machine, oldest first; of more than POINTS_MAX the newest."""

    machine: uuid.UUID
    space_bytes: Count = 0
    points: Annotated[tuple[ListedPoint, ...], Field(max_length=POINTS_MAX)] = ()


class VmPower(StrEnum):
    """DISKS: they are made, and the VM waits."""

    DISKS = "disks"
    ON = "on"
    OFF = "off"


class GuestChoice(StrEnum):
    """AUTO: the disk's own system where it can be booted, else the recovery guest."""

    AUTO = "auto"
    OWN = "own"
    RECOVERY = "recovery"


class SourceDisk(PointDisk):
    """``source``: the point's file, relative to the folder of all points."""

    source: Text


class VirtualMachineOrder(Message):
    """A virtual machine that should exist.

    network:     a network of the compute node; made when it is missing.
    isolated:    that network reaches nothing but its own VMs.
    script:      run by the recovery guest when all is mounted; exit code 0 passes.
    independent: its disks are to stand alone; `VmReport.independent` says when they do.
    """

    id: uuid.UUID
    name: Text
    machine: uuid.UUID
    disks: Annotated[tuple[SourceDisk, ...], Field(max_length=DISKS_MAX)]
    network: Text
    isolated: bool = True
    power: VmPower = VmPower.DISKS
    guest: GuestChoice = GuestChoice.AUTO
    cpu_count: Annotated[int, Field(ge=1, le=64)] = 1
    memory_bytes: Annotated[int, Field(ge=64 << 20, le=1 << 40)] = 512 << 20
    script: Script = ""
    check_seconds_max: Annotated[int, Field(ge=1, le=86400)] = 300
    independent: bool = False


class CheckedFileSystem(Message):
    """A file system that the recovery guest has mounted. ``device`` as the guest calls it."""

    disk: Count
    device: Text
    kind: Text
    clean: bool
    detail: Text = ""
    used_bytes: Count = 0


class VmCheck(Message):
    """What came of the check. ``output``: the end of what the script wrote."""

    passed: bool
    detail: Text = ""
    file_systems: Annotated[tuple[CheckedFileSystem, ...], Field(max_length=FILE_SYSTEMS_MAX)] = ()
    script_exit: int | None = None
    output: Text = ""


class VmState(StrEnum):
    """DISKS_READY: waits to be switched on. UP: its guest has answered, see `VmReport.check`."""

    PREPARING = "preparing"
    DISKS_READY = "disks-ready"
    STARTING = "starting"
    UP = "up"
    STOPPED = "stopped"
    FAILED = "failed"


class VmReport(Message):
    """How a VM is. Times by the compute node's clock, 0 while it has not come to that.

    guest: ``own`` or ``recovery``. independent_share: 0 to 1 of its disks stands alone.
    """

    id: uuid.UUID
    state: VmState
    reason: Text = ""
    guest: Text = ""
    address: Address = ""
    disks_ready_ns: Count = 0
    started_ns: Count = 0
    up_ns: Count = 0
    disks_seconds: Seconds = 0.0
    space_bytes: Count = 0
    independent: bool = False
    independent_share: Share = 0.0
    check: VmCheck | None = None


class EvidenceKind(StrEnum):
    """What a compute node keeps of a VM for people. CONSOLE: text. SCREENSHOT: PNG."""

    CONSOLE = "console"
    SCREENSHOT = "screenshot"


class Evidence(Message):
    """The bytes of a console or screenshot, in base64; at most EVIDENCE_BYTES_MAX of them."""

    content: Annotated[str, Field(max_length=4 * EVIDENCE_BYTES_MAX // 3 + 4)]

    @classmethod
    def of(cls, content: bytes) -> "Evidence":
        assert len(content) <= EVIDENCE_BYTES_MAX
        return cls(content=base64.b64encode(content).decode())

    def bytes(self) -> bytes:
        """Raises PeerError for what is no base64."""
        try:
            return base64.b64decode(self.content, validate=True)
        except binascii.Error as error:
            raise PeerError(f"evidence is not base64: {error}") from error

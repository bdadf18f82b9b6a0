"""What the config server wants of a node: the whole of it, with a version that only grows.

A node keeps the newest one on its disk and follows it when the config server is away.

Source: docs/CONTROL.md §4.
"""

import uuid
from typing import Annotated, ClassVar

from pydantic import Field

from replication.bookmark import DiskShape
from replication.control.message import Message
from replication.control.recovery import HOLDS_MAX, VMS_MAX, Hold, VirtualMachineOrder
from replication.control.role import NodeRole

MACHINE_COUNT_MAX = 1024
REVOKED_COUNT_MAX = 65536


class AssignedDisk(Message):
    """A disk to replicate: its number in the stream, and how large it was when chosen.

    device: the name that the agent reported as its id, which it finds at whatever path.
    """

    index: Annotated[int, Field(ge=0)]
    device: str
    name: str
    size_bytes: Annotated[int, Field(ge=0)]

    def shape(self) -> DiskShape:
        return DiskShape(self.index, self.name, self.size_bytes)


class ResyncOrder(Message):
    """Leave to compare and send what differs.

    request: counts the resyncs that people ask for; one higher than the last the agent carried out
             means: do one now. 0: none was ever asked for.
    allowed: a resync that the agent itself found necessary may begin (the window is open).
    """

    request: Annotated[int, Field(ge=0)] = 0
    allowed: bool = True


class NodeAssignment(Message):
    """What the assignments of all roles have. ``version`` is above 0; it tells two apart."""

    role: ClassVar[NodeRole]
    version: Annotated[int, Field(ge=0)]


class MachineAssignment(NodeAssignment):
    """For a mobility agent.

    replicate:      False: nothing is sent; tracking ends when the machine is not protected.
    protected:      False: forget stream and trackers. It must be said: leaving it out ends nothing.
    process_server: https URL.
    app_interval_seconds: between app-consistent points; 0: none.
    final:          above 0: send one last changeset and let no write be acknowledged after it, for
                    ``final_seconds_max`` at most. Another number is another order; 0 takes it back.
    """

    role: ClassVar[NodeRole] = NodeRole.MACHINE
    machine: uuid.UUID
    name: str
    protected: bool
    replicate: bool = False
    process_server: str = ""
    disks: tuple[AssignedDisk, ...] = ()
    interval_seconds: float = 5.0
    app_interval_seconds: float = 0.0
    resync: ResyncOrder = ResyncOrder()
    final: Annotated[int, Field(ge=0)] = 0
    final_seconds_max: Annotated[float, Field(gt=0, le=3600)] = 300.0


class ProcessServerAssignment(NodeAssignment):
    """For a process server: whose streams it takes, and which certificates are good no more.

    ended:   machines of which nothing that waits here is wanted any more: their protection has
             ended, or another process server takes them. A machine that is in neither list may
             not send, and what it has sent stays.
    revoked: serial numbers in hexadecimal, of certificates that have not yet ended by themselves.
    """

    role: ClassVar[NodeRole] = NodeRole.PROCESS_SERVER
    machines: Annotated[tuple[uuid.UUID, ...], Field(max_length=MACHINE_COUNT_MAX)] = ()
    ended: Annotated[tuple[uuid.UUID, ...], Field(max_length=REVOKED_COUNT_MAX)] = ()
    revoked: Annotated[tuple[str, ...], Field(max_length=REVOKED_COUNT_MAX)] = ()


class AppliedMachine(Message):
    """A machine whose changesets an applier applies, and how long it keeps its points.

    apply: False: what is in the cache stays there; no new points.
    keep:  False: none of its points is thinned any more: protection has ended and they are kept, or
           the machine is failed over. What comes may still be applied.
    """

    id: uuid.UUID
    name: str
    keep: bool = True
    apply: bool = True
    retention_seconds: Annotated[int, Field(ge=0)] = 86400
    crash_frequency_seconds: Annotated[int, Field(ge=0)] = 300


class ApplierAssignment(NodeAssignment):
    """For an applier.

    removed: machines whose points are to be deleted. Only these: a machine that merely is not in
             ``machines`` is left alone, so that a wrong answer never deletes anything.
    holds:   points that stay. One that is not named any more ends, unless its lock is not over.
    """

    role: ClassVar[NodeRole] = NodeRole.APPLIER
    machines: Annotated[tuple[AppliedMachine, ...], Field(max_length=MACHINE_COUNT_MAX)] = ()
    removed: Annotated[tuple[uuid.UUID, ...], Field(max_length=MACHINE_COUNT_MAX)] = ()
    holds: Annotated[tuple[Hold, ...], Field(max_length=HOLDS_MAX)] = ()


class ComputeAssignment(NodeAssignment):
    """For a compute node.

    removed: VMs that are to go with their disks. Only these: one that is not named is left alone.
    """

    role: ClassVar[NodeRole] = NodeRole.COMPUTE
    vms: Annotated[tuple[VirtualMachineOrder, ...], Field(max_length=VMS_MAX)] = ()
    removed: Annotated[tuple[uuid.UUID, ...], Field(max_length=VMS_MAX)] = ()


Assignment = MachineAssignment | ProcessServerAssignment | ApplierAssignment | ComputeAssignment

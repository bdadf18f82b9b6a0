"""What a node says of itself: a heartbeat, every few seconds; only the newest counts.

Source: docs/CONTROL.md §5.
"""

import uuid
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from replication.control.message import Message
from replication.control.recovery import HOLDS_MAX, VMS_MAX, HeldPoint, VmReport
from replication.control.value import Count, Difference, Seconds, Share, Text

REPORT_BYTES_MAX = 1 << 20
REPORT_SECONDS_DEFAULT = 15.0
DEVICES_MAX = 256
TROUBLES_MAX = 64


class Load(Message):
    """How the host of a node is. ``None`` where it cannot be told."""

    cpu_share: Share | None = None
    memory_bytes: Count = 0
    memory_used_bytes: Count = 0


class Trouble(Message):
    """A part of a daemon that is not well."""

    part: Text
    severity: Literal["warning", "critical"]
    reason: Text


class NodeReport(Message):
    """What all nodes say. ``time_ns`` is the node's own clock: skew is measured from it."""

    software: Text = ""
    time_ns: Count
    started_ns: Count = 0
    assignment: Count = 0
    load: Load = Load()
    troubles: Annotated[tuple[Trouble, ...], Field(max_length=TROUBLES_MAX)] = ()


class BlockDevice(Message):
    """A disk that a machine has.

    id:       stable over restarts where the system knows such a name (by-id), else the path.
    reason:   why it cannot be tracked; empty when it can.
    """

    id: Text
    device: Text
    size_bytes: Count
    mounts: tuple[Text, ...] = ()
    is_system: bool = False
    reason: Text = ""


class Phase(StrEnum):
    """Where a machine's replication is."""

    IDLE = "idle"
    INITIAL = "initial replication"
    REPLICATING = "replicating"
    RESYNC_REQUIRED = "resync required"
    RESYNCHRONISING = "resynchronising"
    FAILED = "failed"


class ResyncCause(StrEnum):
    """Why what is at the second site cannot be reached by changes any more."""

    UNCLEAN_SHUTDOWN = "unclean-shutdown"
    DISK_RESIZED = "disk-resized"
    DISKS_CHANGED = "disks-changed"
    TRACKING_LOST = "tracking-lost"
    INTEGRITY = "integrity"
    STREAM_LOST = "stream-lost"
    OPERATOR = "operator"


class MachineReport(NodeReport):
    """Of a mobility agent.

    durable_ns, restorable_ns: bookmarks by the source's clock, as the process server tells.
    skew_ns:      source's clock less the process server's.
    done_bytes, total_bytes: of initial replication or resync; 0 of 0 when there is none.
    resync_request: the newest order that was carried out.
    final:          number of the newest order for a final changeset that is carried out: it is
                    committed as ``final_generation``.``final_number``, and no write has been
                    acknowledged since. 0 when none is, or it no longer holds: see ``final_reason``.
    """

    kind: Literal["machine"] = "machine"
    bios_uuid: uuid.UUID | None = None
    hostname: Text = ""
    system: Text = ""
    kernel: Text = ""
    devices: Annotated[tuple[BlockDevice, ...], Field(max_length=DEVICES_MAX)] = ()
    phase: Phase = Phase.IDLE
    cause: ResyncCause | None = None
    reason: Text = ""
    generation: Count = 0
    committed: Count = 0
    durable_ns: Count = 0
    restorable_ns: Count = 0
    skew_ns: Difference = 0
    todo_bytes: Count = 0
    done_bytes: Count = 0
    total_bytes: Count = 0
    changed_bytes: Count = 0
    sent_bytes: Count = 0
    consistency: Text = ""
    app_consistent_ns: Count = 0
    resync_request: Count = 0
    final: Count = 0
    final_generation: Count = 0
    final_number: Count = 0
    final_reason: Text = ""


class StreamReport(Message):
    """What a process server has of a machine.

    generation, number: the newest changeset that it has committed.
    """

    machine: uuid.UUID
    generation: Count = 0
    number: Count = 0
    durable_ns: Count = 0
    backlog_bytes: Count = 0
    backlog_seconds: Seconds = 0.0


class ProcessServerReport(NodeReport):
    """Of a process server.

    url:             where agents reach it.
    spool_max_bytes: what the spool may fill.
    """

    kind: Literal["process-server"] = "process-server"
    url: Text = ""
    spool_bytes: Count = 0
    spool_max_bytes: Count = 0
    free_bytes: Count = 0
    streams: tuple[StreamReport, ...] = ()


class StoreReport(Message):
    """What an applier has of a machine.

    oldest_ns, newest_ns: times of its points, source's clock; 0 where there is none.
    lost:  why only a resync helps; empty when none is needed.
    removed: its points are deleted, as was asked for.
    """

    machine: uuid.UUID
    generation: Count = 0
    applied: Count = 0
    point_count: Count = 0
    oldest_ns: Count = 0
    newest_ns: Count = 0
    newest_app_ns: Count = 0
    space_bytes: Count = 0
    open_repairs: Count = 0
    lost: Text = ""
    removed: bool = False


class ApplierReport(NodeReport):
    """Of an applier."""

    kind: Literal["applier"] = "applier"
    free_bytes: Count = 0
    stores: tuple[StoreReport, ...] = ()
    holds: Annotated[tuple[HeldPoint, ...], Field(max_length=HOLDS_MAX)] = ()


class ComputeReport(NodeReport):
    """Of a compute node. ``accelerator``: ``kvm`` or ``tcg``."""

    kind: Literal["compute"] = "compute"
    free_bytes: Count = 0
    accelerator: Text = ""
    vms: Annotated[tuple[VmReport, ...], Field(max_length=VMS_MAX)] = ()
    removed: Annotated[tuple[uuid.UUID, ...], Field(max_length=VMS_MAX)] = ()


AnyReport = MachineReport | ProcessServerReport | ApplierReport | ComputeReport
Report = Annotated[AnyReport, Field(discriminator="kind")]
_REPORT: TypeAdapter[Report] = TypeAdapter(Report)


def read_report(document: object) -> Report | None:
    """A report as it is stored. None for what is none, or was written by a neighbouring version
    and cannot be read by this one: it counts as if it had never come.
    """
    try:
        return _REPORT.validate_python(document)
    except ValidationError:
        return None


class ReportAnswer(Message):
    """The config server's clock and the newest version of the node's assignment."""

    time_ns: Count
    assignment: Count

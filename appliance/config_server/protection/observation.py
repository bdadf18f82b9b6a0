"""What the nodes' reports mean for a machine: pure.

The agent knows its phase, the applier its points; the config server itself sees disks that have
another size than when they were chosen. What comes out are events of the table, with their cause.

Source: docs/CONTROL.md §9, §11.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from appliance.config_server.protection.table import Event, State
from replication.control.report import MachineReport, Phase, ResyncCause, StoreReport

_WATCHED = frozenset(
    {
        State.INITIAL_REPLICATION,
        State.PROTECTED,
        State.RESYNC_REQUIRED,
        State.RESYNCHRONISING,
    }
)
"""States that reports change; in the others a job looks for itself."""


@dataclass(frozen=True, slots=True)
class DiskView:
    """A disk of a machine as it was chosen."""

    index: int
    device_id: str
    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class MachineView:
    """A machine's row. ``disks``: those that are not excluded."""

    state: State
    since_ns: int
    cause: str = ""
    resync_request: int = 0
    resync_in_window: bool = False
    disks: tuple[DiskView, ...] = ()


@dataclass(frozen=True, slots=True)
class Happening:
    """An event and what is known about it.

    order: the agent does not know of it, so the config server has to order the resync.
    """

    event: Event
    cause: ResyncCause | None = None
    reason: str = ""
    order: bool = False


@dataclass(frozen=True, slots=True)
class Observation:
    """What a round of reports brings. ``sizes``: new sizes in bytes, by the disks' numbers."""

    happenings: tuple[Happening, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()


def apply_report(
    view: MachineView, agent: MachineReport | None, store: StoreReport | None, *, skew_ns: int = 0
) -> Observation:
    """The events that follow from the newest reports of the agent and of the applier.

    skew_ns: the source's clock less the config server's.
    Saying the same thing twice brings no second event.
    """
    if view.state not in _WATCHED or agent is None:
        return Observation()
    # What turns up during a resync is looked at when that has ended: a second one may be needed.
    sizes = () if agent.phase is Phase.RESYNCHRONISING else tuple(_resized(view, agent))
    found = tuple(_happenings(view, agent, store, bool(sizes), skew_ns))
    return Observation(found[:1], sizes)


def _happenings(
    view: MachineView,
    agent: MachineReport,
    store: StoreReport | None,
    resized: bool,
    skew_ns: int,
) -> Iterator[Happening]:
    """The weightiest first."""
    if agent.phase is Phase.RESYNC_REQUIRED:
        cause = agent.cause or ResyncCause.TRACKING_LOST
        if view.state is not State.RESYNC_REQUIRED or view.cause != cause:
            yield Happening(Event.RESYNC_REQUIRED, cause, agent.reason)
        return
    if agent.phase is Phase.RESYNCHRONISING:
        if view.state is not State.RESYNCHRONISING:
            yield Happening(Event.RESYNC_BEGUN, agent.cause, agent.reason)
        return
    if resized:
        yield Happening(
            Event.RESYNC_REQUIRED,
            ResyncCause.DISK_RESIZED,
            "; ".join(_resizes(view, agent)),
            order=True,
        )
        return
    if store is not None and store.lost and store.generation >= agent.generation:
        if not (view.state is State.RESYNC_REQUIRED and view.cause == ResyncCause.INTEGRITY):
            yield Happening(Event.RESYNC_REQUIRED, ResyncCause.INTEGRITY, store.lost, order=True)
        return
    if store is None or not _restorable(view, agent, store, skew_ns):
        return
    if view.state is State.INITIAL_REPLICATION:
        yield Happening(Event.FIRST_POINT)
    elif view.state is State.RESYNCHRONISING or (
        view.state is State.RESYNC_REQUIRED
        and agent.resync_request >= view.resync_request
        and not view.resync_in_window
    ):
        yield Happening(Event.RESYNC_DONE)


def _restorable(view: MachineView, agent: MachineReport, store: StoreReport, skew_ns: int) -> bool:
    """Whether there is a point of what is replicated now, not merely one of before.

    A point is, when it was taken since the state began, or when nothing is left to be applied (the
    agent says that it replicates only after a consistent changeset; an idle machine makes no more).
    """
    return (
        agent.phase is Phase.REPLICATING
        and store.generation == agent.generation
        and store.newest_ns > 0
        and (store.newest_ns - skew_ns >= view.since_ns or store.applied >= agent.committed)
    )


def _resized(view: MachineView, agent: MachineReport) -> Iterator[tuple[int, int]]:
    sizes = {device.id: device.size_bytes for device in agent.devices}
    for disk in view.disks:
        size = sizes.get(disk.device_id, disk.size_bytes)
        if size and size != disk.size_bytes:
            yield disk.index, size


def _resizes(view: MachineView, agent: MachineReport) -> Iterator[str]:
    disks = {disk.index: disk for disk in view.disks}
    for index, size in _resized(view, agent):
        disk = disks[index]
        yield f"disk {index} ({disk.name}) has {size} bytes now, {disk.size_bytes} when chosen"

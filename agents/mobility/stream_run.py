"""One run of replication: from its configuration, disks and trackers to its clean end."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from agents.mobility.app_scripts import run_post_if_due
from agents.mobility.config import AgentConfig, AgentSettings, DiskConfig
from agents.mobility.device import Device
from agents.mobility.disk_set import adopt_disks
from agents.mobility.final_order import FinalBook
from agents.mobility.freeze import Freezer, refuse_own, thaw_all
from agents.mobility.interruption import find_interruption
from agents.mobility.replicator import Replicator
from agents.mobility.resync_stage import Stage
from agents.mobility.source import SourceDisk
from agents.mobility.stream_client import StreamClient
from agents.mobility.stream_state import StreamStateFile
from agents.mobility.tracker import Tracker, reason_untrackable
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.pins import remove_other_disks
from agents.mobility.tracker.scan import ScanTracker
from daemon.service import Service
from replication.control.assignment import ResyncOrder
from replication.errors import TrackingError

_AT_ANY_TIME = (None, Stage.SENDING)
"""Stages of a resync in which disks may come and go; else that is part of the resync."""


@dataclass(frozen=True, slots=True)
class Running:
    """What replicates now, for whoever reports of it and orders it about."""

    replicator: Replicator
    client: StreamClient
    state: StreamStateFile


async def replicate(
    config: AgentConfig,
    service: Service,
    *,
    on_running: Callable[[Running], None],
    order: Callable[[], ResyncOrder] | None = None,
    final: FinalBook | None = None,
    server_unit: str = "",
) -> None:
    """Replicate until ``service.stop`` is set; trackers go on tracking afterwards.

    The machine's folder of state is this process's alone already. Raises ReplicationError where a
    disk is missing, cannot be tracked, or has become another one under the run.

    order:       the config server's newest word on resyncs; without one the configuration's counts.
    final:       the config server's orders for a final changeset.
    server_unit: organizational unit of a process server's certificate; empty: not looked at.
    """
    with contextlib.ExitStack() as stack:
        state = StreamStateFile(config.state_folder, config.machine)
        disks = [stack.enter_context(_open_disk(config, disk, state)) for disk in config.disks]
        mounts = [fs for disk in disks for fs in disk.file_systems()]
        own = [config.state_folder]
        own += [disk.device.loop_image for disk in disks if disk.device.loop_image]
        refuse_own(mounts, own)
        make_up_for_a_kill(config, state.folder, [fs.mount_point for fs in mounts])
        interruption = find_interruption(disks, state)
        position = state.position
        if interruption is None and position.pending is None and position.stage in _AT_ANY_TIME:
            adopt_disks(
                state,
                {disk.index: disk.block_count for disk in disks},
                {disk.index: disk.device.identity for disk in disks},
            )
        _end_tracking_of_others(config, disks, state)
        freezer = stack.enter_context(Freezer())

        def on_trouble(trouble: str) -> None:
            service.health.report("process server", warning=trouble)

        async with StreamClient(
            config.process_server,
            config.machine,
            config.tls,
            config.send,
            stopping=service.stop,
            on_trouble=on_trouble,
            server_unit=server_unit,
        ) as client:
            replicator = Replicator(
                config,
                disks,
                state=state,
                client=client,
                freezer=freezer,
                service=service,
                interrupted=interruption,
                order=order,
                final=final,
            )
            on_running(Running(replicator, client, state))
            service.ready(f"disks tracked by {config.tracker}: {len(disks)}")
            await replicator.run()


def make_up_for_a_kill(config: AgentSettings, state_folder: str, mounts: Sequence[str]) -> None:
    """Do what an agent that was killed could not: thaw, then run the post scripts that it owes."""
    log = structlog.get_logger()
    left = thaw_all(mounts)
    if left:
        log.warning("file systems had been left frozen", mounts=left)
    app = config.app_consistency
    report = run_post_if_due(state_folder, app.post, app.script_seconds_max)
    if report is not None:
        log.warning("post scripts were owed and have run", trouble=report.reason or None)


def refuse_untrackable(config: AgentSettings, device: Device) -> None:
    """Raise TrackingError where the kernel cannot tell the disk's changes, and has to."""
    reason = reason_untrackable(device) if config.tracker == "ebpf" else None
    if reason:
        raise TrackingError(
            f"{device.path} cannot be tracked: {reason}",
            hint='tracker = "scan" finds changes by checksums instead, without points in time '
            "while the disk is busy",
        )


@contextlib.contextmanager
def _open_disk(
    config: AgentConfig, disk: DiskConfig, state: StreamStateFile
) -> Iterator[SourceDisk]:
    device = Device.open(disk.device)
    try:
        refuse_untrackable(config, device)
        known = state.position.identities.get(disk.index)
        if known is not None and device.size_bytes < known.size_bytes:
            raise TrackingError(
                f"{device.path} shrank from {known.size_bytes} to {device.size_bytes} bytes",
                hint="a disk that shrinks loses data: check that it is the right one, then remove "
                f"{state.folder} to replicate it anew",
            )
        tracker: Tracker
        digests = _digests_path(state, disk.index)
        if config.tracker == "scan":
            tracker = ScanTracker.attach(device, digests)
        else:
            if os.path.exists(digests):
                # A later scan would not see what has changed, was sent, and has changed back.
                ScanTracker(device, digests).remove()
            tracker = EbpfTracker.attach(config.machine, disk.index, device)
        try:
            yield SourceDisk(disk.shape(device.size_bytes), device, tracker)
        finally:
            tracker.close()
    finally:
        device.close()


def _digests_path(state: StreamStateFile, index: int) -> str:
    return os.path.join(state.folder, f"disk{index}.digests")


def _end_tracking_of_others(
    config: AgentConfig, disks: Sequence[SourceDisk], state: StreamStateFile
) -> None:
    """Stop tracking disks that are not protected any more, once the state knows none of them."""
    kept = {disk.index for disk in disks} | set(state.position.identities)
    if config.tracker == "ebpf":
        remove_other_disks(config.machine, kept)
        return
    for name in os.listdir(state.folder):
        stem = name.partition(".digests")[0].removeprefix("disk")
        if ".digests" in name and stem.isdecimal() and int(stem) not in kept:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(state.folder, name))

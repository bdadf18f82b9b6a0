"""``understudy-agent``: the mobility agent of one protected machine."""

import argparse
import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator

import structlog

from agents.mobility.app_scripts import check_scripts
from agents.mobility.config import AgentConfig, DiskConfig
from agents.mobility.device import Device
from agents.mobility.freeze import Freezer, refuse_own, thaw_all
from agents.mobility.interruption import find_interruption
from agents.mobility.mounts import mounted_file_systems
from agents.mobility.replicator import Replicator
from agents.mobility.source import SourceDisk
from agents.mobility.stream_client import StreamClient
from agents.mobility.stream_state import StreamStateFile
from agents.mobility.tracker import Tracker, reason_untrackable
from agents.mobility.tracker.ebpf import EbpfTracker
from agents.mobility.tracker.pins import remove_machine
from agents.mobility.tracker.scan import ScanTracker
from daemon.durable import make_folder
from daemon.heap import bound_heap
from daemon.service import Service, fail, run_daemon
from replication.errors import ConfigError, ReplicationError, TrackingError


def main() -> int:
    """Parse the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="understudy-agent", description="Replicates the disks of this machine."
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    parser.add_argument(
        "action",
        nargs="?",
        choices=("run", "check", "thaw", "forget"),
        default="run",
        help="run (the default); check the configuration and the disks; thaw file systems that "
        "were left frozen; forget: stop tracking this machine's disks",
    )
    options = parser.parse_args()
    # The interpreter may lie on a disk that is frozen: reading from it goes on, writing would wait.
    sys.dont_write_bytecode = True
    try:
        config = AgentConfig.load(options.config)
        if options.action == "thaw":
            _thaw(config)
            return 0
        if options.action == "forget":
            remove_machine(config.machine)
            return 0
        config.data_key()
        check_scripts((*config.app_consistency.pre, *config.app_consistency.post))
        if options.action == "check":
            _check(config)
            return 0
    except ReplicationError as error:
        return fail(error)
    bound_heap()
    return run_daemon("agent", config.service, lambda service: serve(config, service))


def _thaw(config: AgentConfig) -> None:
    """Thaw what lies on the disks; one that is missing keeps no other one frozen."""
    trouble: list[ReplicationError] = []
    for disk in config.disks:
        try:
            device = Device.open(disk.device)
            try:
                thaw_all([fs.mount_point for fs in mounted_file_systems(device)])
            finally:
                device.close()
        except ReplicationError as error:
            trouble.append(error)
    if trouble:
        raise trouble[0]


def _check(config: AgentConfig) -> None:
    for disk in config.disks:
        device = Device.open(disk.device)
        _refuse_untrackable(config, device)
        device.close()


def _refuse_untrackable(config: AgentConfig, device: Device) -> None:
    reason = reason_untrackable(device) if config.tracker == "ebpf" else None
    if reason:
        raise TrackingError(
            f"{device.path} cannot be tracked: {reason}",
            hint='tracker = "scan" finds changes by checksums instead, without points in time '
            "while the disk is busy",
        )


async def serve(config: AgentConfig, service: Service) -> None:
    """Run the agent until ``service.stop`` is set."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_alone(config))
        state = StreamStateFile(config.state_folder, config.machine)
        disks = [stack.enter_context(_open_disk(config, disk, state)) for disk in config.disks]
        mounts = [fs for disk in disks for fs in disk.file_systems()]
        own = [config.state_folder]
        own += [disk.device.loop_image for disk in disks if disk.device.loop_image]
        refuse_own(mounts, own)
        left = thaw_all([fs.mount_point for fs in mounts])
        if left:
            structlog.get_logger().warning("file systems had been left frozen", mounts=left)
        interrupted = find_interruption(disks, state)
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
        ) as client:
            replicator = Replicator(
                config,
                disks,
                state=state,
                client=client,
                freezer=freezer,
                service=service,
                interrupted=interrupted,
            )
            service.ready(f"{len(disks)} disks tracked by {config.tracker}")
            await replicator.run()


@contextlib.contextmanager
def _alone(config: AgentConfig) -> Iterator[None]:
    """Two agents that share a state and a tracker would lose each other's changes."""
    folder = os.path.join(config.state_folder, str(config.machine))
    make_folder(folder)
    path = os.path.join(folder, "agent.lock")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"another agent of machine {config.machine} runs: {path} is locked",
            hint="stop it, or give this one a machine id and a state folder of its own",
        ) from error
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _open_disk(
    config: AgentConfig, disk: DiskConfig, state: StreamStateFile
) -> Iterator[SourceDisk]:
    device = Device.open(disk.device)
    try:
        _refuse_untrackable(config, device)
        known = state.position.identities.get(disk.index)
        if known is not None and device.size_bytes < known.size_bytes:
            raise TrackingError(
                f"{device.path} shrank from {known.size_bytes} to {device.size_bytes} bytes",
                hint="a disk that shrinks loses data: check that it is the right one, then remove "
                f"{state.folder} to replicate it anew",
            )
        tracker: Tracker
        if config.tracker == "scan":
            table = os.path.join(state.folder, f"disk{disk.index}.digests")
            tracker = ScanTracker.attach(device, table)
        else:
            tracker = EbpfTracker.attach(config.machine, disk.index, device)
        try:
            yield SourceDisk(disk.shape(device.size_bytes), device, tracker)
        finally:
            tracker.close()
    finally:
        device.close()


if __name__ == "__main__":
    sys.exit(main())

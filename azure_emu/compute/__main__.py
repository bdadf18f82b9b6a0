"""The compute node: ``understudy-compute --config FILE.toml [run | enrol | disk … | clear]``."""

import argparse
import asyncio
import functools
import os
import sys
import uuid
from collections.abc import Sequence

from azure_emu.compute import disk
from azure_emu.compute.clearing import clear
from azure_emu.compute.config import ComputeConfig
from azure_emu.compute.node import NETWORKS_FOLDER, VMS_FOLDER, Node
from azure_emu.compute.record import VmFolder
from daemon.control_client import ControlClient
from daemon.durable import make_folder
from daemon.enrolment import add_enrol_options, enrol_command
from daemon.folder_lock import FolderLock
from daemon.service import Service, fail, run_daemon
from replication.control.assignment import ComputeAssignment
from replication.control.recovery import EvidenceKind
from replication.control.report import ComputeReport
from replication.control.role import NodeRole
from replication.errors import ConfigError, InputError, NotFoundError, ReplicationError

CHANGES_SECONDS = 0.2
"""So much time reports leave for more changes to come."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the configuration and run until told to stop; return the exit code."""
    parser = argparse.ArgumentParser(prog="understudy-compute", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("run", help="run until told to stop (the default)")
    add_enrol_options(actions.add_parser("enrol", help="enrol with the config server"))
    disks = actions.add_parser("disk", help="export a disk, or keep how it is (VM switched off)")
    disks.add_argument("verb", choices=("export", "snapshot", "delete-snapshot"))
    disks.add_argument("vm", type=uuid.UUID)
    disks.add_argument("index", type=int)
    disks.add_argument("name", help="the file to write, or the snapshot's name")
    actions.add_parser("clear", help="remove every VM, disk and network (the daemon does not run)")
    options = parser.parse_args(arguments)
    try:
        config = ComputeConfig.load(options.config)
        if options.action == "disk":
            asyncio.run(_disk(config, options.verb, options.vm, options.index, options.name))
            return 0
        if options.action != "enrol" and os.geteuid() != 0:
            raise ConfigError(
                "the compute node makes networks and runs as root",
                hint="run it as root, as its unit does",
            )
        if options.action == "clear":
            asyncio.run(_clear(config))
            return 0
    except ReplicationError as error:
        return fail(error)
    if options.action == "enrol":
        return enrol_command(options, config.control, NodeRole.COMPUTE)
    return run_daemon("compute", config.service, functools.partial(serve, config))


async def serve(config: ComputeConfig, service: Service) -> None:
    """Keep the VMs that the config server orders, until ``service.stop``; they outlive that."""
    if config.control is None:
        raise ConfigError(
            "there is no [control]: nobody would order a VM",
            hint="give control.config_server and control.identity_folder, then enrol",
        )
    make_folder(config.data_folder)
    in_use = ConfigError(
        f"{config.data_folder} is in use by another compute node",
        hint="give each its own data_folder",
    )
    client = ControlClient(
        config.control, ComputeAssignment, health=service.health, stop=service.stop
    )
    with FolderLock(config.data_folder, in_use):
        async with client as control, asyncio.TaskGroup() as group:
            await _follow(config, service, control, group)


async def _follow(
    config: ComputeConfig,
    service: Service,
    control: ControlClient[ComputeAssignment],
    group: asyncio.TaskGroup,
) -> None:
    async def put(vm: uuid.UUID, kind: EvidenceKind, content: bytes) -> None:
        await control.put_evidence(vm, kind, content)

    async def report() -> ComputeReport:
        return await node.report(control.version)

    async def tell() -> None:
        while True:
            await node.changed.wait()
            node.changed.clear()
            control.report_now()
            await asyncio.sleep(CHANGES_SECONDS)

    async def follow() -> None:
        async for assignment in control.assignments():
            await node.follow(assignment, group)

    node = Node(config, service, put)
    tasks = [
        group.create_task(node.run(group), name="accelerator"),
        group.create_task(control.run(report), name="control"),
        group.create_task(tell(), name="changes"),
    ]
    await node.adopted.wait()
    tasks.append(group.create_task(follow(), name="orders"))
    service.ready("virtual machines of a config server's")
    await service.stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    await node.stop()


async def _clear(config: ComputeConfig) -> None:
    folder = config.data_folder
    await clear(
        config,
        vms_folder=os.path.join(folder, VMS_FOLDER),
        networks_folder=os.path.join(folder, NETWORKS_FOLDER),
    )


async def _disk(config: ComputeConfig, verb: str, vm: uuid.UUID, index: int, name: str) -> None:
    folder = VmFolder(os.path.join(config.data_folder, VMS_FOLDER), vm)
    record = folder.read()
    if record is None:
        raise NotFoundError(f"there is no VM {vm} in {config.data_folder}")
    made = disk.disks_of(folder.path, config.points_folder, record.order.disks)
    found = next((each for each in made if each.index == index), None)
    if found is None:
        raise InputError(f"VM {vm} has no disk {index}")
    if verb == "export":
        await disk.export(found, name)
    elif verb == "snapshot":
        await disk.snapshot(found, name)
    else:
        await disk.delete_snapshot(found, name)


if __name__ == "__main__":
    sys.exit(main())

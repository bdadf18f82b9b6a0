"""The vSphere emulator's command: play a vCenter, power guests, run their workloads."""

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence

from prometheus_client import Gauge

from daemon.service import Service, fail, run_daemon
from replication.errors import ReplicationError, StorageError
from vsphere_emu.config import Config
from vsphere_emu.datastore import Datastore
from vsphere_emu.guest import Guest, GuestStatus
from vsphere_emu.power import troubles
from vsphere_emu.vcenter import VCenter

HEALTH_INTERVAL_SECONDS = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 or that of the error's class."""
    asked = _parser().parse_args(arguments)
    action = f"workload-{asked.workload_action}" if asked.action == "workload" else asked.action
    try:
        config = Config.load(asked.config)
        if action == "serve":
            vcenter = VCenter(config)
            return run_daemon(
                "vsphere-emu", config.service, lambda service: _serve(vcenter, service)
            )
        datastore = Datastore(config.datastore.name, config.datastore.folder)
        chosen = config.select(tuple(asked.guests))
        guests = [Guest(guest, datastore, config.root_folder) for guest in chosen]
        if action == "remove":
            _remove(guests, delete_disks=asked.delete_disks)
        else:
            for guest in guests:
                _act(guest, "power-cut" if getattr(asked, "cut", False) else action)
        _show([guest.status() for guest in guests], as_json=asked.json)
    except ReplicationError as error:
        return fail(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="understudy-vsphere-emu", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    parser.add_argument("--json", action="store_true", help="print the guests' state as JSON")
    actions = parser.add_subparsers(dest="action", required=True)
    for name, text in (
        ("power-on", "create, attach and mount the disks"),
        ("power-off", "stop the workload, unmount and detach the disks"),
        ("status", "tell what there is"),
        ("remove", "take away every process, mount and loop device"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("guests", nargs="*", metavar="GUEST", help="all, if none is named")
        if name == "remove":
            action.add_argument("--delete-disks", action="store_true", help="the VMDKs too")
        if name == "power-off":
            action.add_argument("--cut", action="store_true", help="as a power cut does")
    actions.add_parser("serve", help="play the vCenter of [vcenter] until SIGTERM or SIGINT")
    workload = actions.add_parser("workload", help="what guests do with their disks")
    workload.add_argument("workload_action", choices=("start", "stop", "status"))
    workload.add_argument("guests", nargs="*", metavar="GUEST", help="all, if none is named")
    return parser


def _act(guest: Guest, action: str) -> None:
    match action:
        case "power-on":
            guest.power_on()
        case "power-off":
            guest.power_off()
        case "power-cut":
            guest.cut_power()
        case "workload-start":
            guest.start_workload()
        case "workload-stop":
            guest.stop_workload()


async def _serve(vcenter: VCenter, service: Service) -> None:
    restarts = Gauge(
        "understudy_vcsim_restarts",
        "How often the emulated vCenter has been restarted",
        registry=service.registry,
    )
    restarts.set_function(lambda: vcenter.service.restarts)
    await vcenter.start()
    running = asyncio.create_task(vcenter.run(), name="vcenter")
    watching = asyncio.create_task(_report(vcenter, service), name="health")
    stopping = asyncio.create_task(service.stop.wait(), name="stop")
    tasks = {running, watching, stopping}
    try:
        service.ready(vcenter.service.name)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await vcenter.stop()


async def _report(vcenter: VCenter, service: Service) -> None:
    while True:
        down = "" if vcenter.service.is_ready else "it does not answer: being restarted"
        service.health.report("vcenter", critical=down)
        service.health.report("guests", warning=troubles(vcenter.switches))
        await asyncio.sleep(HEALTH_INTERVAL_SECONDS)


def _remove(guests: list[Guest], *, delete_disks: bool) -> None:
    """Go on past a guest that resists, so that it alone is left; then tell of it."""
    refused = []
    for guest in guests:
        try:
            guest.remove_all_traces(delete_disks=delete_disks)
        except ReplicationError as error:
            refused.append(f"{guest.config.name}: {error}")
    if refused:
        raise StorageError("; ".join(refused), hint="end what holds it, then run remove again")


def _show(guests: list[GuestStatus], *, as_json: bool) -> None:
    if as_json:
        told = {"guests": [dataclasses.asdict(guest) for guest in guests]}
        sys.stdout.write(json.dumps(told, indent=2) + "\n")
        return
    for guest in guests:
        power = "on" if guest.is_powered_on else "off"
        work = f"{guest.workload} (process {guest.workload_pid})" if guest.workload_pid else "idle"
        sys.stdout.write(f"{guest.name}: {power}, {work}\n")
        for disk in guest.disks:
            where = f"{disk.device or '-'} {disk.mount or '-'}"
            sys.stdout.write(f"  {disk.vmdk} {disk.size_bytes} {disk.file_system} {where}\n")


if __name__ == "__main__":
    sys.exit(main())

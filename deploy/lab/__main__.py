"""``python -m deploy.lab up|down|status``; people type ``understudy lab …``."""

import argparse
import json
import os
import sys
import time

from rich.console import Console

from daemon.service import fail
from deploy.lab.layout import FOLDER_DEFAULT, Layout, Ports
from deploy.lab.proof import list_points
from deploy.lab.stack import Stack, only_one
from deploy.lab.story import Story
from deploy.lab.vm_story import VmLab, VmStory
from replication.errors import NotFoundError, ReplicationError, StorageError

LOAD_SECONDS_DEFAULT = 15.0
PIPE_WIDTH = 120


def main() -> int:
    """Run one command; 0, or 1 with the reason when something does not hold."""
    parser = argparse.ArgumentParser(prog="understudy lab", description=__doc__)
    parser.add_argument("--folder", default=FOLDER_DEFAULT, help="where the lab lives")
    parser.add_argument("--port-base", type=int, default=Ports().base, help="first of 100 ports")
    actions = parser.add_subparsers(dest="action", required=True)
    up = actions.add_parser("up", help="bring everything up and prove it")
    up.add_argument("--load-seconds", type=float, default=LOAD_SECONDS_DEFAULT)
    actions.add_parser("vm", help="the source as a virtual machine, the agent inside it")
    actions.add_parser("down", help="remove every trace")
    status = actions.add_parser("status", help="what runs, and how far each machine is")
    status.add_argument("--json", action="store_true")
    options = parser.parse_args()
    stack = Stack(Layout(options.folder, Ports(options.port_base)))
    try:
        match options.action:
            case "up":
                _up(stack, options.load_seconds)
            case "vm":
                _vm(stack)
            case "down":
                VmLab(stack.layout).stop()
                _down(stack)
            case "status":
                _status(stack, as_json=options.json)
    except ReplicationError as error:
        fail(error)
        if options.action in ("up", "vm") and os.path.exists(stack.layout.root):
            sys.stderr.write(
                "The lab stays as it was when this failed: the same command goes on from there, "
                "`make lab-down` removes every trace.\n"
            )
        return 1
    return 0


def _console() -> Console:
    """A pipe has no width: lines stay whole there."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


def _up(stack: Stack, load_seconds: float) -> None:
    console = _console()
    began = time.monotonic()
    with only_one(stack.layout):
        Story(stack, console, load_seconds=load_seconds).tell()
    console.print(
        f"\nEverything holds, after {time.monotonic() - began:.0f} s. The lab stays up:\n"
        f"  {stack.layout.points}  every recovery point as a folder of disk images\n"
        f"  source {stack.layout.operator_env}  then: understudy machines, health, jobs, events …\n"
        "  understudy lab status     what runs\n"
        "  make lab-down             removes every trace"
    )


def _vm(stack: Stack) -> None:
    console = _console()
    began = time.monotonic()
    with only_one(stack.layout):
        VmStory(stack, console).tell()
    console.print(
        f"\nEverything holds, after {time.monotonic() - began:.0f} s. The machine stays up:\n"
        f"  {VmLab(stack.layout).source().console_path}  its serial console\n"
        f"  source {stack.layout.operator_env}  then: understudy machines, health, jobs, events …\n"
        "  make lab-vm-down          removes every trace"
    )


def _down(stack: Stack) -> None:
    left = stack.down()
    if left:
        raise StorageError("something is left of the lab: " + "; ".join(left))
    Console(highlight=False).print(
        "The lab is gone: no process, mount, loop device or file is left."
    )


def _status(stack: Stack, *, as_json: bool) -> None:
    if not os.path.exists(stack.layout.config("vsphere")):
        raise NotFoundError(f"there is no lab in {stack.layout.root}", hint="`make lab` makes one")
    parts = [{"part": part.name, "pid": part.pid()} for part in stack.parts()]
    machines = []
    for guest in stack.layout.guests():
        news = stack.news(guest.config.name)
        machines.append(
            {
                "machine": guest.config.name,
                "state": news.state if news else "not replicating",
                "trouble": news.trouble if news else "",
                "committed": news.committed if news else "",
                "applied": news.applied if news else "",
                "points": len(list_points(stack.layout, guest.config.name)),
            }
        )
    if as_json:
        sys.stdout.write(json.dumps({"parts": parts, "machines": machines}, indent=2) + "\n")
        return
    console = _console()
    for part in parts:
        pid = part["pid"]
        console.print(f"{part['part']:18} {f'process {pid}' if pid else '[red]not running[/red]'}")
    for machine in machines:
        console.print(
            f"{machine['machine']:18} {machine['state']}, committed {machine['committed']}, "
            f"applied {machine['applied']}, {machine['points']} points {machine['trouble']}",
            markup=False,
        )


if __name__ == "__main__":
    sys.exit(main())

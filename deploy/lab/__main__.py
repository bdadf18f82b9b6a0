"""``python -m deploy.lab up|vm|down|status``; people type ``understudy lab …``."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer
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


app = typer.Typer(
    name="understudy lab",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def lab(
    context: typer.Context,
    *,
    folder: Annotated[str, typer.Option(help="Where the lab lives.")] = FOLDER_DEFAULT,
    port_base: Annotated[
        int, typer.Option(metavar="PORT", min=1024, max=65_436, help="The first of 100 ports.")
    ] = Ports().base,
) -> None:
    """A rehearsal on this machine: guests, both sites and all that is between them."""
    context.obj = Stack(Layout(folder, Ports(port_base)))


@app.command()
def up(
    context: typer.Context,
    *,
    load_seconds: Annotated[
        float, typer.Option(metavar="S", min=0, help="How long the workloads run.")
    ] = LOAD_SECONDS_DEFAULT,
) -> None:
    """Bring everything up, prove it, and leave it running. It goes on where it stopped."""
    with _stays(context.obj):
        _up(context.obj, load_seconds)


@app.command()
def vm(context: typer.Context) -> None:
    """The source as a virtual machine, with the mobility agent inside it."""
    with _stays(context.obj):
        _vm(context.obj)


@app.command()
def down(context: typer.Context) -> None:
    """Remove every trace."""
    VmLab(context.obj.layout).stop()
    _down(context.obj)


@app.command()
def status(
    context: typer.Context,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What runs, and how far each machine is."""
    _status(context.obj, as_json=as_json)


def main() -> int:
    """Run one command; 0, or 1 with the reason when something does not hold."""
    try:
        app(prog_name="understudy lab")
    except ReplicationError as error:
        fail(error)
        for note in getattr(error, "__notes__", ()):
            sys.stderr.write(f"{note}\n")
        return 1
    return 0


@contextlib.contextmanager
def _stays(stack: Stack) -> Iterator[None]:
    """Say what becomes of a lab that did not come up."""
    try:
        yield
    except ReplicationError as error:
        if os.path.exists(stack.layout.root):
            error.add_note(
                "The lab stays as it was when this failed: the same command goes on from there, "
                "`make lab-down` removes every trace."
            )
        raise


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

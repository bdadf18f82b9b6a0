"""``understudy protect`` and ``unprotect``: begin and end a protection."""

from typing import Annotated, Any

import typer
from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.text import Text

from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.failover_choice import confirm
from appliance.cli.jobs import follow_job, started, watch
from appliance.cli.machines import progress_share
from appliance.cli.names import MachineName, Wait, Yes, complete_policy
from appliance.cli.output import (
    AsJson,
    percent,
    print_json,
    print_line,
    size,
    state_style,
)
from replication.errors import ConfigError, NotFoundError

COPYING = frozenset({"enabling", "initial-replication", "resynchronising"})


def protect(
    machine: MachineName,
    *,
    policy: Annotated[
        str,
        typer.Option(metavar="POLICY", help="See `policies`.", autocompletion=complete_policy),
    ],
    disk: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE", help="Replicate only this disk; repeatable."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE", help="All disks but this one; repeatable."),
    ] = None,
    process_server: Annotated[
        str | None, typer.Option(metavar="NAME", help="Chosen by itself if not given.")
    ] = None,
    applier: Annotated[
        str | None, typer.Option(metavar="NAME", help="Chosen by itself if not given.")
    ] = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Begin to replicate a machine. With --wait: until it has its first recovery point."""
    if disk and exclude:
        raise ConfigError("give --disk or --exclude, not both")
    with connect() as api:
        body: dict[str, Any] = {"policy": policy}
        if disk:
            body["disks"] = disk
        if exclude:
            body["disks"] = _all_but(api, machine, exclude)
        if process_server:
            body["process_server"] = process_server
        if applier:
            body["applier"] = applier
        job = api.post(f"/machines/{part(machine)}/protect", body)
        if not wait:
            started(api, job, wait=False, as_json=as_json)
            return
        follow_job(api, job["id"], as_json=False, quiet=as_json)
        follow_machine(api, machine, as_json=as_json)


def unprotect(
    machine: MachineName,
    *,
    keep_points: Annotated[
        bool, typer.Option("--keep-points", help="Leave its recovery points where they are.")
    ] = False,
    yes: Yes = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """End a machine's protection, and delete its recovery points unless they are kept."""
    question = f"Delete all recovery points of {machine}? (--keep-points keeps them)"
    confirm(question, yes=yes or keep_points)
    with connect() as api:
        job = api.post(f"/machines/{part(machine)}/unprotect", {"keep_points": keep_points})
        started(api, job, wait=wait, as_json=as_json)


def follow_machine(api: ApiClient, machine: str, *, as_json: bool) -> None:
    """Show an initial replication or a resync until it is over."""
    found = watch(
        lambda: dict(api.get(f"/machines/{part(machine)}")),
        is_over=lambda one: one["state"] not in COPYING,
        draw=_draw,
        lines=_lines,
        quiet=as_json,
    )
    if as_json:
        print_json(found)
    else:
        print_line(f"{found['name']} is {found['state']}.", style=state_style(found["state"]))


def _draw(machine: dict[str, Any]) -> Group:
    head = Text(f"{machine['name']}  {machine['state']}  ", style="bold")
    share = progress_share(machine)
    if share is None:
        return Group(head)
    progress = machine["progress"]
    head.append(
        f"{size(progress['done_bytes'])} of {size(progress['total_bytes'])}", style="not bold"
    )
    return Group(head, ProgressBar(total=1.0, completed=share, width=60))


def _lines(machine: dict[str, Any]) -> list[str]:
    share = progress_share(machine)
    if share is None:
        return [f"{machine['name']}: {machine['state']}"]
    tenth = int(share * 10) / 10
    return [f"{machine['name']}: {machine['state']}, {percent(tenth)}"]


def _all_but(api: ApiClient, machine: str, excluded: list[str]) -> list[str]:
    """The disks that can be replicated, less the named ones."""
    disks = api.get(f"/machines/{part(machine)}")["disks"]
    known = {name for disk in disks for name in (disk["id"], disk["device"])}
    unknown = [name for name in excluded if name not in known]
    if unknown:
        raise NotFoundError(
            f"{machine} has no disk {unknown[0]}",
            hint=f"`understudy disks list {machine}` shows them",
        )
    left = [
        disk["id"]
        for disk in disks
        if not disk["reason"] and disk["present"] and not {disk["id"], disk["device"]} & {*excluded}
    ]
    if not left:
        raise ConfigError(f"no disk of {machine} is left to replicate")
    return left

"""``understudy failover``: from a recovery point to a machine that runs at the second site."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.failover_choice import (
    Compute,
    FailoverId,
    Network,
    NoShutDown,
    Notes,
    PointChoice,
    asked_for,
    confirm,
    failovers_of,
    find_failover,
    read_script,
    told_network,
)
from appliance.cli.failover_told import (
    tell_failover,
    told_cancel,
    told_cleanup,
    told_commit,
    told_point,
)
from appliance.cli.jobs import follow_job, started
from appliance.cli.names import MachineName, Wait, Yes, complete_machine, is_id
from appliance.cli.output import (
    AsJson,
    Column,
    instant,
    print_json,
    print_line,
    print_rows,
    span,
    state_style,
    text_or_dash,
)
from replication.errors import ConfigError, ConflictError, NotFoundError

app = typer.Typer(no_args_is_help=True, help="Run machines at the second site.")

MEMORY_MIB_MAX = 1 << 20

Guest = Annotated[
    str,
    typer.Option(
        metavar="auto|own|recovery",
        help="Boot the disk's own system or the recovery guest; auto: the own one where it can be.",
    ),
]
ScriptFile = Annotated[
    str | None,
    typer.Option(
        "--script", metavar="FILE", help="The recovery guest runs it; exit code 0 passes."
    ),
]
Cpus = Annotated[int, typer.Option("--cpus", metavar="N", help="Processors.", min=1, max=64)]
Memory = Annotated[
    int,
    typer.Option("--memory", metavar="MIB", help="In MiB.", min=64, max=MEMORY_MIB_MAX),
]
CheckSeconds = Annotated[
    int,
    typer.Option("--check-seconds", metavar="S", help="For the check, at most.", min=1, max=86400),
]
WaitSeconds = Annotated[
    int,
    typer.Option(
        "--wait-seconds",
        metavar="S",
        help="For the newest changes, then what there is.",
        min=0,
        max=86400,
    ),
]
KINDS_THAT_ACT = ("planned", "unplanned")


@app.command("test")
def try_out(
    machine: MachineName,
    *,
    point: PointChoice = "latest",
    network: Network = None,
    compute: Compute = None,
    guest: Guest = "auto",
    script: ScriptFile = None,
    cpus: Cpus = 1,
    memory: Memory = 512,
    check_seconds: CheckSeconds = 300,
    wait_seconds: WaitSeconds = 120,
    notes: Notes = "",
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Try a machine on a network of its own; replication goes on."""
    body = asked_for(point, network, compute, notes)
    body |= _made(guest, script, cpus, memory, check_seconds)
    body |= {"kind": "test", "wait_seconds": wait_seconds}
    _ask(machine, body, wait=wait, as_json=as_json)


@app.command()
def planned(
    machine: MachineName,
    *,
    network: Network = None,
    compute: Compute = None,
    guest: Guest = "auto",
    script: ScriptFile = None,
    cpus: Cpus = 1,
    memory: Memory = 512,
    check_seconds: CheckSeconds = 300,
    notes: Notes = "",
    yes: Yes = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Move a machine that lives: send its last change, switch it off, lose nothing."""
    confirm(f"Switch {machine} off and run it at the second site?", yes=yes)
    body: dict[str, Any] = {"network": network, "compute": compute, "notes": notes}
    body |= _made(guest, script, cpus, memory, check_seconds)
    _ask(machine, {**body, "kind": "planned"}, wait=wait, as_json=as_json)


@app.command()
def unplanned(
    machine: MachineName,
    *,
    point: PointChoice = "latest",
    network: Network = None,
    compute: Compute = None,
    guest: Guest = "auto",
    script: ScriptFile = None,
    cpus: Cpus = 1,
    memory: Memory = 512,
    check_seconds: CheckSeconds = 300,
    wait_seconds: WaitSeconds = 120,
    no_shut_down: NoShutDown = False,
    notes: Notes = "",
    yes: Yes = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Run a machine at the second site whatever has become of it. What is newer than the point is
    lost.
    """
    confirm(f"Run {machine} at the second site? What is newer than the point is lost.", yes=yes)
    body = asked_for(point, network, compute, notes)
    body |= _made(guest, script, cpus, memory, check_seconds)
    body |= {"kind": "unplanned", "wait_seconds": wait_seconds, "shut_down": not no_shut_down}
    _ask(machine, body, wait=wait, as_json=as_json)


@app.command()
def commit(
    machine: MachineName,
    *,
    delete_points: Annotated[
        bool, typer.Option("--delete-points", help="Delete its other recovery points.")
    ] = False,
    failover: FailoverId = None,
    yes: Yes = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Keep a failover for good: its point cannot be changed any more, nor can it be cancelled."""
    lost = " and delete its other recovery points" if delete_points else ""
    with connect() as api:
        found = find_failover(api, machine, failover=failover, kinds=KINDS_THAT_ACT)
        _refuse_unsettled(found, "commit")
        confirm(f"Commit the failover of {machine}{lost}?", yes=yes)
        body = {"delete_points": delete_points}
        _act(api, found, "commit", body, told_commit, wait=wait, as_json=as_json)


@app.command()
def cancel(
    machine: MachineName,
    *,
    failover: FailoverId = None,
    yes: Yes = False,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Take a failover back: the machine is protected as before. What its VM wrote is lost."""
    with connect() as api:
        found = find_failover(api, machine, failover=failover, kinds=KINDS_THAT_ACT)
        _refuse_unsettled(found, "cancel")
        confirm(f"Cancel the failover of {machine}? What its VM has written is lost.", yes=yes)
        _act(api, found, "cancel", None, told_cancel, wait=wait, as_json=as_json)


@app.command()
def cleanup(
    machine: MachineName,
    *,
    notes: Notes = "",
    failover: FailoverId = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Remove all of a test failover; the notes stay."""
    with connect() as api:
        found = find_failover(api, machine, failover=failover, kinds=("test",))
        body = {"notes": notes}
        _act(api, found, "cleanup", body, told_cleanup, wait=wait, as_json=as_json)


@app.command("change-point")
def change_point(
    machine: MachineName,
    *,
    point: Annotated[
        str, typer.Option(metavar="POINT", help="As `points` lists it, or latest-processed, …")
    ],
    failover: FailoverId = None,
    wait: Wait = False,
    as_json: AsJson = False,
) -> None:
    """Go to another recovery point, until the failover is committed."""
    with connect() as api:
        found = find_failover(api, machine, failover=failover, kinds=KINDS_THAT_ACT)
        body = {"point": point}
        _act(api, found, "change-point", body, told_point, wait=wait, as_json=as_json)


@app.command("list")
def list_failovers(
    *,
    machine: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of this one.", autocompletion=complete_machine),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="test, planned or unplanned.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Also those that are over.")] = False,
    count: Annotated[int, typer.Option("-n", help="How many at most.", min=1)] = 50,
    as_json: AsJson = False,
) -> None:
    """List failovers and test failovers, the newest first."""
    params = {"machine": machine, "kind": kind, "open": None if every else True}
    with connect() as api:
        found = api.items("/failovers", params, count_max=count)
    if as_json:
        print_json(found)
        return
    print_rows(
        found,
        (
            Column("machine", "machine"),
            Column("kind", "kind"),
            Column("state", "state", style=state_style),
            Column("point", "point", text_or_dash),
            Column("consistency", "consistency", text_or_dash),
            Column("RTO", "rto_seconds", span, right=True),
            Column("RPO", "rpo_seconds", span, right=True),
            Column("asked", "asked_ns", instant),
            Column("failover", "id"),
        ),
        as_json=False,
        none="There are none." if every else "None is open; --all lists those that are over.",
    )


@app.command()
def show(
    machine: Annotated[
        str,
        typer.Argument(
            metavar="MACHINE|ID",
            help="A machine, or a failover's id.",
            autocompletion=complete_machine,
        ),
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Show a failover whole; of a machine its newest one."""
    with connect() as api:
        try:
            newest = failovers_of(api, machine, count_max=1)
        except NotFoundError:
            if not is_id(machine):
                raise
            newest = [api.get(f"/failovers/{part(machine)}")]
        if not newest:
            raise NotFoundError(f"{machine} was never failed over, nor was that tested")
        found = newest[0]
    if as_json:
        print_json(found)
        return
    tell_failover(found)


def _made(
    guest: str, script: str | None, cpus: int, memory: int, check_seconds: int
) -> dict[str, Any]:
    """How the VM is made."""
    if guest not in ("auto", "own", "recovery"):
        raise ConfigError(f"--guest: {guest!r:.40} is none", hint="one of auto, own, recovery")
    return {
        "guest": guest,
        "script": read_script(script),
        "cpu_count": cpus,
        "memory_bytes": memory << 20,
        "check_seconds_max": check_seconds,
    }


def _ask(machine: str, body: dict[str, Any], *, wait: bool, as_json: bool) -> None:
    with connect() as api:
        job = api.post(f"/machines/{part(machine)}/failovers", body)
        if not wait:
            started(api, job, wait=False, as_json=as_json)
            if not as_json:
                print_line(told_network(body["kind"], body["network"]), style="dim")
            return
        follow_job(api, job["id"], as_json=False, quiet=as_json)
        # The newest: the job's own, unless somebody has begun another one since it ended.
        (found,) = failovers_of(api, machine, count_max=1)
    if as_json:
        print_json(found)
    else:
        tell_failover(found)


def _refuse_unsettled(found: dict[str, Any], verb: str) -> None:
    """Raises ConflictError, before anybody is asked, where there is nothing to ``verb``."""
    if found["state"] not in ("up", "cancelling"):
        raise ConflictError(
            f"there is nothing to {verb}: the failover of {found['machine']} is {found['state']}",
            hint=f"`understudy failover show {found['machine']}` tells more",
        )


def _act(
    api: ApiClient,
    found: dict[str, Any],
    verb: str,
    body: dict[str, Any] | None,
    told: Callable[[ApiClient, dict[str, Any]], str],
    *,
    wait: bool,
    as_json: bool,
) -> None:
    """Ask for what follows a failover. ``told``: what has come of it, where it is waited for."""
    job = api.post(f"/failovers/{found['id']}/{verb}", body)
    started(api, job, wait=wait, as_json=as_json)
    if wait and not as_json:
        print_line(told(api, api.get(f"/failovers/{found['id']}")))

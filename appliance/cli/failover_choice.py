"""Which failover a command is about, and how one is asked for."""

import sys
from typing import Annotated, Any

import typer

from appliance.cli.api_client import ApiClient, part
from appliance.cli.names import is_id
from appliance.cli.output import instant, read_file
from replication.errors import ConfigError, ConflictError, NotFoundError

FailoverId = Annotated[
    str | None,
    typer.Option(
        "--failover",
        metavar="ID",
        help="Which one, where the machine has several; `failover list`.",
    ),
]
PointChoice = Annotated[
    str,
    typer.Option(
        "--point",
        metavar="POINT",
        help="latest, latest-processed, latest-app-consistent, or a name that `points` lists.",
    ),
]
Network = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Of the compute node; made there if it is missing. A test's is isolated always, and "
        "one of its own if not given.",
    ),
]
Compute = Annotated[
    str | None, typer.Option(metavar="NAME", help="The compute node; the emptiest if not given.")
]
Notes = Annotated[str, typer.Option(metavar="TEXT", help="Kept with it.")]
NoShutDown = Annotated[
    bool, typer.Option("--no-shut-down", help="Leave the source running (unplanned only).")
]


def asked_for(point: str, network: str | None, compute: str | None, notes: str) -> dict[str, Any]:
    """What every request has that makes machines at the second site."""
    return {"point": point, "network": network, "compute": compute, "notes": notes}


def find_failover(
    api: ApiClient,
    machine: str,
    *,
    failover: str | None = None,
    kinds: tuple[str, ...] = ("test", "planned", "unplanned"),
) -> dict[str, Any]:
    """The open failover of a machine of one of ``kinds``; errors name what there is."""
    found = [
        each
        for each in failovers_of(api, machine, is_open=True)
        if each["kind"] in kinds and (failover is None or each["id"] == failover)
    ]
    if not found:
        what = "test failover" if kinds == ("test",) else "failover"
        raise NotFoundError(
            f"{machine} has no open {what}" + (f" {failover}" if failover else ""),
            hint="`understudy failover list` shows what there is",
        )
    if len(found) > 1:
        each = "; ".join(
            f"{one['id']} ({one['kind']}, {one.get('point') or one['state']}, "
            f"{instant(one['asked_ns'])})"
            for one in found
        )
        raise ConflictError(f"{machine} has {len(found)} of them: {each}", hint="--failover ID")
    return found[0]


def find_evidence(
    api: ApiClient, machine: str, kind: str, *, failover: str | None = None
) -> dict[str, Any]:
    """The newest failover of a machine that has left a ``kind`` of evidence, open or over: why one
    failed is what people look for most.
    """
    found = failovers_of(api, machine)
    for each in found:
        if each[f"has_{kind}"] and failover in (None, each["id"]):
            return each
    raise NotFoundError(
        f"no VM of {machine} has left a {kind} yet"
        + (f" in failover {failover}" if failover else ""),
        hint="the compute node sends it when its check has ended or has failed",
    )


def find_drill(api: ApiClient, drill: str) -> str:
    """The id of a drill that is named by it, or by what it was of: then the newest one's."""
    if is_id(drill):
        return part(drill)
    for found in api.items("/drills"):
        if found["target"] == drill:
            return str(found["id"])
    raise NotFoundError(
        f"there is no drill {drill}, nor one of it", hint="`understudy drills list`"
    )


def failovers_of(
    api: ApiClient, machine: str, *, is_open: bool | None = None, count_max: int | None = None
) -> list[dict[str, Any]]:
    """A machine's failovers, the newest first; the machine by name, or by id."""
    params = {"machine": machine, "open": is_open}
    found = api.items("/failovers", params, count_max=count_max)
    if found:
        return found
    # Nothing by that name: is it an id, or a machine at all?
    name = api.get(f"/machines/{part(machine)}")["name"]
    if name == machine:
        return []
    return api.items("/failovers", {"machine": name, "open": is_open}, count_max=count_max)


def told_network(kind: str, network: str | None) -> str:
    """Where a VM will be, for people: a network is made by being named."""
    if kind != "test":
        return f"Its network: {network or 'default'}, which is made if it is missing."
    if network is None:
        return "Its network: one of its own, isolated."
    return f"Its network: {network}, isolated; it is made if it is missing."


def read_script(path: str | None) -> str:
    """The text of a check script; empty for none."""
    return "" if path is None else read_file(path)


def confirm(question: str, *, yes: bool) -> None:
    """Ask, unless told not to; ConfigError where that is not a terminal."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"{question} This is not a terminal", hint="say --yes")
    typer.confirm(question, abort=True, err=True)

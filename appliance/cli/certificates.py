"""``understudy certificates``: of nodes, how one is shut out, and how it is let in again."""

import time
from typing import Annotated, Any

import typer

from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.output import AsJson, Column, instant, print_json, print_line, print_rows
from replication.errors import ConflictError, NotFoundError

app = typer.Typer(
    no_args_is_help=True, help="Nodes' certificates: list them, shut a node out, let one come back."
)


@app.command("list")
def list_certificates(
    *,
    every: Annotated[bool, typer.Option("--all", help="Expired and revoked ones as well.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the certificates that are good, with --all those that were."""
    with connect() as api:
        found = [one for one in api.items("/certificates") if every or _is_good(one)]
    if as_json:
        print_json(found)
        return
    print_rows(
        sorted(
            ({**one, "state": _state(one)} for one in found),
            key=lambda one: (one["role"], one["name"], one["issued_ns"]),
        ),
        (
            Column("node", "name"),
            Column("role", "role"),
            Column("state", "state"),
            Column("ends", "expires_ns", instant),
            Column("serial", "serial"),
        ),
        as_json=False,
        none="No node has a certificate.",
    )


@app.command()
def revoke(
    certificate: Annotated[
        str, typer.Argument(metavar="SERIAL|NODE", help="A serial, or a node's name or id.")
    ],
    *,
    as_json: AsJson = False,
) -> None:
    """Revoke a node's certificates: refused at once, until it is allowed and enrolled again."""
    with connect() as api:
        revoked = api.post(f"/certificates/{part(_serial(api, certificate))}/revoke")
    if as_json:
        print_json(revoked)
    else:
        count = len(revoked["revoked"])
        noun = "certificate is" if count == 1 else "certificates are"
        print_line(f"{revoked['certificate']['name']}: {count} {noun} good no more.")


@app.command()
def allow(
    node: Annotated[str, typer.Argument(metavar="NODE", help="A node's name or id.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Let a node without a good certificate enrol with a new key: once, within an hour."""
    with connect() as api:
        allowed = api.post(f"/certificates/allow/{part(_node(api, node))}")
    if as_json:
        print_json(allowed)
    else:
        until = instant(allowed["until_ns"])
        print_line(f"{allowed['name']} may enrol with a new key until {until}: `enrol --again`.")


def _node(api: ApiClient, wanted: str) -> str:
    found = api.items("/certificates")
    nodes = {one["node"] for one in found if wanted in (one["name"], one["node"])}
    if not nodes:
        raise NotFoundError(
            f"no node {wanted!r} was ever enrolled", hint="`understudy certificates list --all`"
        )
    return str(_only(nodes, wanted))


def _only(nodes: set[str], wanted: str) -> str:
    if len(nodes) > 1:
        raise ConflictError(
            f"{len(nodes)} nodes are called {wanted!r}",
            hint="give a serial or an id: `understudy certificates list --all --json`",
        )
    return next(iter(nodes))


def _serial(api: ApiClient, wanted: str) -> str:
    found = api.items("/certificates")
    if any(one["serial"] == wanted for one in found):
        return wanted
    named = [one for one in found if wanted in (one["name"], one["node"]) and _is_good(one)]
    if not named:
        raise NotFoundError(
            f"no good certificate has the serial or belongs to the node {wanted!r}",
            hint="`understudy certificates list --all`",
        )
    _only({one["node"] for one in named}, wanted)
    return str(named[0]["serial"])


def _is_good(one: dict[str, Any]) -> bool:
    return _state(one) == "good"


def _state(one: dict[str, Any]) -> str:
    if one["revoked_ns"]:
        return "revoked"
    return "good" if one["expires_ns"] > time.time_ns() else "expired"

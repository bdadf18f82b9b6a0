"""``understudy certificates``: of nodes, and how one is shut out."""

import time
from typing import Annotated, Any

import typer

from appliance.cli.api_client import ApiClient, connect, part
from appliance.cli.output import AsJson, Column, instant, print_json, print_line, print_rows
from replication.errors import ConflictError, NotFoundError

app = typer.Typer(no_args_is_help=True, help="Nodes' certificates: list them, shut a node out.")


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
    """Revoke a node's certificates: it is refused at once, until it is enrolled again."""
    with connect() as api:
        revoked = api.post(f"/certificates/{part(_serial(api, certificate))}/revoke")
    if as_json:
        print_json(revoked)
    else:
        count = len(revoked["revoked"])
        noun = "certificate is" if count == 1 else "certificates are"
        print_line(f"{revoked['certificate']['name']}: {count} {noun} good no more.")


def _serial(api: ApiClient, wanted: str) -> str:
    found = api.items("/certificates")
    if any(one["serial"] == wanted for one in found):
        return wanted
    named = [one for one in found if wanted in (one["name"], one["node"]) and _is_good(one)]
    nodes = {one["node"] for one in named}
    if len(nodes) > 1:
        raise ConflictError(
            f"{len(nodes)} nodes are called {wanted!r}",
            hint="give a serial or an id: `understudy certificates list --json`",
        )
    if not named:
        raise NotFoundError(
            f"no good certificate has the serial or belongs to the node {wanted!r}",
            hint="`understudy certificates list --all`",
        )
    return str(named[0]["serial"])


def _is_good(one: dict[str, Any]) -> bool:
    return _state(one) == "good"


def _state(one: dict[str, Any]) -> str:
    if one["revoked_ns"]:
        return "revoked"
    return "good" if one["expires_ns"] > time.time_ns() else "expired"

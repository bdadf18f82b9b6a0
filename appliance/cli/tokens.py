"""``understudy tokens``: who may use the API."""

import time
from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect, part
from appliance.cli.output import (
    AsJson,
    Column,
    instant,
    print_json,
    print_line,
    print_rows,
    text_or_dash,
)

app = typer.Typer(no_args_is_help=True, help="Operators' tokens: who may use the API.")


@app.command("list")
def list_tokens(*, as_json: AsJson = False) -> None:
    """List the tokens. What they are is told only once, when they are made."""
    with connect() as api:
        found = api.items("/tokens")
    if as_json:
        print_json(found)
        return
    print_rows(
        [{**one, "state": _state(one)} for one in found],
        (
            Column("token", "name"),
            Column("role", "role"),
            Column("state", "state"),
            Column("made", "created_ns", instant),
            Column("by", "created_by", text_or_dash),
            Column("ends", "expires_ns", instant),
        ),
        as_json=False,
        none="There are no tokens.",
    )


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is, or what it is for.")],
    *,
    role: Annotated[
        str, typer.Option(metavar="ROLE", help="reader, operator or contributor.")
    ] = "reader",
    days: Annotated[int | None, typer.Option(help="How long it is good.", min=1)] = None,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, this once."""
    body: dict[str, Any] = {"name": name, "role": role}
    if days is not None:
        body["days"] = days
    with connect() as api:
        made = api.post("/tokens", body)
    if as_json:
        print_json(made)
        return
    typer.echo(made["token"])
    typer.secho(
        f"{made['name']}: {made['role']}, good until {instant(made['expires_ns'])}. "
        "It is not shown again.",
        err=True,
    )


@app.command()
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the token.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Revoke a token; it is refused from now on."""
    with connect() as api:
        api.delete(f"/tokens/{part(name)}")
    if as_json:
        print_json({"name": name, "revoked": True})
    else:
        print_line(f"{name}: good no more.")


def _state(one: dict[str, Any]) -> str:
    if one["revoked_ns"]:
        return "revoked"
    return "good" if one["expires_ns"] > time.time_ns() else "expired"

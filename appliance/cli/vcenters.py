"""``understudy vcenters``: which vCenters are discovered."""

import time
from typing import Annotated, Any

import typer

from appliance.cli.api_client import connect, part
from appliance.cli.names import VCenterName
from appliance.cli.output import (
    AsJson,
    Column,
    print_json,
    print_line,
    print_rows,
    span,
    state_style,
    text_or_dash,
)
from appliance.cli.secret_input import read_secret
from appliance.cli.sign_in import read_pem
from replication.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="vCenters whose virtual machines are discovered.")

PasswordFile = Annotated[
    str | None,
    typer.Option("--password-file", metavar="FILE", help="Read the password from FILE."),
]
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input.")
]
CaFile = Annotated[
    str | None,
    typer.Option("--ca", metavar="FILE", help="PEM of the CA of its certificate."),
]
Verify = Annotated[
    str | None,
    typer.Option(
        metavar="ca|pinned|none",
        help="Check its certificate against that CA (as by default), or that it is the very one in "
        "--ca FILE, or not at all.",
    ),
]


@app.command("list")
def list_vcenters(*, as_json: AsJson = False) -> None:
    """List the vCenters and whether they answer."""
    with connect() as api:
        found = api.items("/vcenters")
    if as_json:
        print_json(found)
        return
    print_rows(
        [{**one, "answered": _ago(one.get("seen_ns", 0))} for one in found],
        (
            Column("vCenter", "name"),
            Column("address", "url"),
            Column("user", "username"),
            Column("state", "state", style=state_style),
            Column("answered", "answered", right=True),
            Column("VMs", "vm_count", text_or_dash, right=True),
            Column("why", "reason", text_or_dash, wraps=True),
        ),
        as_json=False,
        none="No vCenter is known; add one: understudy vcenters add NAME URL --username USER",
    )


@app.command()
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What you call it.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="As https://vcenter.example.net.")],
    *,
    username: Annotated[str, typer.Option(metavar="USER", help="A user that may read.")],
    password_file: PasswordFile = None,
    password_stdin: PasswordStdin = False,
    ca: CaFile = None,
    verify: Verify = None,
    as_json: AsJson = False,
) -> None:
    """Add a vCenter; its password is asked for, or read from a file or standard input."""
    password = read_secret("vCenter password", file=password_file, from_stdin=password_stdin)
    body: dict[str, Any] = {"name": name, "url": url, "username": username, "password": password}
    if ca:
        body["ca_pem"] = read_pem(ca)
    if verify:
        body["verify"] = verify
    with connect() as api:
        made = api.post("/vcenters", body)
    if as_json:
        print_json(made)
    else:
        print_line(f"{name}: added; its virtual machines are being read: understudy vms discovered")


@app.command()
def update(
    name: VCenterName,
    *,
    url: Annotated[str | None, typer.Option(metavar="URL", help="A new address.")] = None,
    username: Annotated[str | None, typer.Option(metavar="USER", help="Another user.")] = None,
    password_file: PasswordFile = None,
    password_stdin: PasswordStdin = False,
    password: Annotated[bool, typer.Option("--password", help="Ask for a new password.")] = False,
    ca: CaFile = None,
    verify: Verify = None,
    as_json: AsJson = False,
) -> None:
    """Change a vCenter's address, user or password."""
    body: dict[str, Any] = {"url": url, "username": username}
    if password or password_file or password_stdin:
        body["password"] = read_secret(
            "vCenter password", file=password_file, from_stdin=password_stdin
        )
    if ca:
        body["ca_pem"] = read_pem(ca)
    if verify:
        body["verify"] = verify
    body = {key: value for key, value in body.items() if value is not None}
    if not body:
        raise ConfigError(
            "nothing is to be changed", hint="see `understudy vcenters update --help`"
        )
    with connect() as api:
        changed = api.patch(f"/vcenters/{part(name)}", body)
    if as_json:
        print_json(changed)
    else:
        print_line(f"{name}: changed; it is asked anew.")


@app.command()
def remove(name: VCenterName, *, as_json: AsJson = False) -> None:
    """Forget a vCenter and what is known of its virtual machines."""
    with connect() as api:
        api.delete(f"/vcenters/{part(name)}")
    if as_json:
        print_json({"name": name, "removed": True})
    else:
        print_line(f"{name}: removed.")


def _ago(seen_ns: int) -> str:
    return f"{span((time.time_ns() - seen_ns) / 1e9)} ago" if seen_ns else "never"

"""``understudy pki``: certificates and data keys for a protection that is set up by hand."""

import json
import uuid
from dataclasses import asdict
from typing import Annotated

import typer

from appliance.cli.authority import Authority, Issued, create_data_key
from replication.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Make certificates and data keys.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def init(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where the CA is to live.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Create a certificate authority of one's own."""
    _tell(Authority.create(folder), "certificate authority", as_json=as_json)


@app.command()
def issue(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The folder of the CA.")],
    *,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Where the new files go.")],
    machine: Annotated[
        str | None, typer.Option(metavar="UUID", help="For the agent of this machine.")
    ] = None,
    server: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="For a server of this DNS name or address; repeatable."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Issue the certificate of an agent's machine or of a server."""
    if (machine is None) == (not server):
        raise ConfigError("say for whom: either --machine UUID or --server NAME")
    authority = Authority.open(folder)
    if machine is not None:
        issued = authority.issue_machine(_read_machine(machine), out)
    else:
        issued = authority.issue_server(server or [], out)
    _tell(issued, "certificate", as_json=as_json)


@app.command("data-key")
def data_key(
    path: Annotated[str, typer.Argument(metavar="FILE", help="Where the key is to be written.")],
    *,
    as_json: AsJson = False,
) -> None:
    """Make the data key of a machine: give it to its agent and to the applier, to nobody else."""
    create_data_key(path)
    typer.echo(json.dumps({"path": path}) if as_json else f"data key: {path}")


def _read_machine(text: str) -> uuid.UUID:
    try:
        return uuid.UUID(text)
    except ValueError as error:
        raise ConfigError(f"--machine: {text!r:.80} is not a UUID", hint="see `uuidgen`") from error


def _tell(issued: Issued, what: str, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({**asdict(issued), "expires": issued.expires.isoformat()}))
    else:
        typer.echo(f"{what} {issued.subject} in {issued.folder}, good until {issued.expires:%F}")

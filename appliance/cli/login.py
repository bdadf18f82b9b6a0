"""``understudy login`` and ``logout``: which config server, as whom."""

import hashlib
import secrets
import ssl
from typing import Annotated, Any

import httpx
import typer
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from appliance.cli.api_client import API_PREFIX, TIMEOUT_SECONDS, ApiClient
from appliance.cli.output import AsJson, print_json, printable
from appliance.cli.secret_input import read_secret
from appliance.cli.sign_in import (
    SignIn,
    check_url,
    forget_sign_in,
    read_pem,
    sign_in_file,
    store_sign_in,
)
from replication.control.enrolment import NONCE_BYTES, ChallengeRequest
from replication.control.role import NodeRole
from replication.errors import ConfigError, PeerError, UnavailableError

_DIGEST_PREFIX = "sha256:"


def login(
    url: Annotated[str, typer.Argument(metavar="URL", help="As https://config.example.net.")],
    *,
    token_stdin: Annotated[
        bool, typer.Option("--token-stdin", help="Read the token from standard input.")
    ] = False,
    token_file: Annotated[
        str | None, typer.Option("--token-file", metavar="FILE", help="Read the token from FILE.")
    ] = None,
    ca: Annotated[
        str | None, typer.Option("--ca", metavar="FILE", help="PEM of the config server's CA.")
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(metavar="sha256:…", help="Digest of that CA, as the config server shows it."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign in to a config server; the token is kept in ~/.config/understudy/login.json."""
    address = check_url(url)
    if ca and fingerprint:
        raise ConfigError("give --ca or --fingerprint, not both")
    ca_pem = read_pem(ca) if ca else _fetch_ca(address, fingerprint) if fingerprint else ""
    token = read_secret("token", file=token_file, from_stdin=token_stdin)
    sign_in = SignIn(url=address, token=token, ca_pem=ca_pem)
    with ApiClient(sign_in) as api:
        me = api.get("/me")
    sign_in = sign_in.model_copy(
        update={"name": str(me.get("name", "")), "role": str(me.get("role", ""))}
    )
    path = store_sign_in(sign_in)
    if as_json:
        print_json({"url": address, "name": sign_in.name, "role": sign_in.role, "file": path})
    else:
        typer.echo(f"Signed in to {address} as {printable(sign_in.name)} ({sign_in.role}).")


def logout(*, as_json: AsJson = False) -> None:
    """Forget the config server and the token. The token itself stays good until it is revoked."""
    was_in = forget_sign_in()
    if as_json:
        print_json({"signed_out": was_in, "file": sign_in_file()})
    else:
        typer.echo("Signed out." if was_in else "Nobody was signed in.")


def _fetch_ca(url: str, fingerprint: str) -> str:
    """The CA that the server names, if it is the one that the fingerprint tells.

    The connection cannot be trusted yet: nothing secret goes over it, and what comes is only
    believed for its digest.
    """
    wanted = fingerprint.removeprefix(_DIGEST_PREFIX).replace(":", "").lower()
    if not fingerprint.startswith(_DIGEST_PREFIX) or len(wanted) != 64:
        raise ConfigError(f"{fingerprint!r:.100} is not sha256: and 64 hexadecimal digits")
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    asked = ChallengeRequest(client_nonce=secrets.token_hex(NONCE_BYTES), role=NodeRole.MACHINE)
    try:
        answer = httpx.post(
            f"{url}{API_PREFIX}/enrolment/challenges",
            content=asked.model_dump_json(),
            headers={"Content-Type": "application/json"},
            verify=context,
            timeout=TIMEOUT_SECONDS,
            trust_env=False,
        )
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"cannot reach the config server {url}: {error}", hint="is it running there?"
        ) from error
    ca_pem = _pem_of(answer)
    found = hashlib.sha256(
        x509.load_pem_x509_certificate(ca_pem.encode()).public_bytes(Encoding.DER)
    ).hexdigest()
    if not secrets.compare_digest(found, wanted):
        raise PeerError(
            f"the CA of {url} is {_DIGEST_PREFIX}{found}, not the one given",
            hint="a typing error, another config server, or somebody in between: do not go on",
        )
    return ca_pem


def _pem_of(answer: httpx.Response) -> str:
    try:
        tree: Any = answer.json()
        pem = str(tree["ca_pem"])
        x509.load_pem_x509_certificate(pem.encode())
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(
            f"{answer.url.host} does not answer as a config server", hint="is the address right?"
        ) from error
    return pem

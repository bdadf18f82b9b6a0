"""A vCenter as it is to be reached: address, credentials, and how its certificate is checked."""

import ssl
import uuid
from dataclasses import dataclass, field
from enum import StrEnum
from urllib.parse import urlsplit

from replication.errors import InputError

PORT_DEFAULT = 443
URL_CHARS_MAX = 255
PATH_DEFAULT = "/sdk"


class Verify(StrEnum):
    """How a vCenter's certificate is checked.

    CA:     it is signed by one of the given CAs (by one that the system trusts where none is
            given), and is for the host of the address.
    PINNED: it is the given one.
    NONE:   not at all; only ever because an operator says so.
    """

    CA = "ca"
    PINNED = "pinned"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the API is: ``https://host[:port][/path]``."""

    host: str
    port: int
    path: str


@dataclass(frozen=True, slots=True)
class Target:
    """What a reader needs to read one vCenter; ``revision`` is that of the entry it is made of.

    instance_uuid: of the vCenter that was found there before; empty: none yet.
    """

    id: uuid.UUID
    name: str
    url: str
    username: str
    password: str = field(repr=False)
    verify: Verify
    ca_pem: str = field(repr=False)
    revision: int
    instance_uuid: str = ""


def parse_url(url: str) -> Address:
    """Raise InputError for what is no address of a vCenter: https, a host, nothing else but port
    and path. Credentials have no place in it: it is shown to readers.
    """
    hint = "it looks like https://vcenter.example.com"
    try:
        parts = urlsplit(url)
        port = parts.port or PORT_DEFAULT
    except ValueError as error:
        raise InputError(f"url: {error}", hint=hint) from error
    if parts.scheme != "https" or not parts.hostname:
        raise InputError("url: not an https address", hint=hint)
    if parts.username is not None or parts.password is not None:
        raise InputError("url: it holds a user", hint="give username and password by themselves")
    if parts.query or parts.fragment or any(ord(letter) <= 32 for letter in url):
        raise InputError("url: more than host, port and path", hint=hint)
    path = parts.path.rstrip("/")
    return Address(parts.hostname, port, path or PATH_DEFAULT)


def tls_context(verify: Verify, ca_pem: str) -> ssl.SSLContext:
    """Raise InputError when ``ca_pem`` holds no certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if verify is Verify.NONE:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    if verify is Verify.PINNED:
        # The given certificate is trusted itself, whoever signed it and whatever it is for.
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if not ca_pem.strip():
            raise InputError("ca_pem: missing", hint="give the vCenter's certificate as PEM")
    if not ca_pem.strip():
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise InputError("ca_pem: not a certificate in PEM") from error
    return context

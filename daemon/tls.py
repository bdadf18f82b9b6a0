"""TLS as all parts speak it: version 1.3 only, certificates on both sides, one private CA."""

import os
import ssl
import stat
from typing import Any

from daemon.config import Section
from replication.errors import ConfigError

CONFIG_SERVER_UNIT = "config-server"
"""Organizational unit of the config server's own certificate; a node's is its role."""


class TlsFiles(Section):
    """Paths of PEM files: own certificate and key, and the CA that signs the other side's."""

    certificate: str
    key: str
    ca: str


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For a listener that demands a client certificate."""
    context = _context(files, ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For a client that shows its own certificate and checks the server's name."""
    return _context(files, ssl.PROTOCOL_TLS_CLIENT)


def demand_unit(context: ssl.SSLContext, unit: str) -> None:
    """Speak only to servers whose certificate has this organizational unit.

    All servers under one config server have certificates of its CA; none may pass for another
    kind. Handshakes with others end with ssl.SSLCertVerificationError.
    """

    class UnitObject(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            _check_unit(self.getpeercert(), unit)

    class UnitSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            super().do_handshake(block)
            _check_unit(self.getpeercert(), unit)

    context.sslobject_class = UnitObject
    context.sslsocket_class = UnitSocket


def _check_unit(certificate: Any, unit: str) -> None:
    subject = (certificate or {}).get("subject", ())
    units = [
        value
        for relative in subject
        for name, value in relative
        if name == "organizationalUnitName"
    ]
    if units != [unit]:
        what = unit.replace("-", " ")
        raise ssl.SSLCertVerificationError(f"its certificate is not that of a {what}")


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        if os.stat(files.key).st_mode & stat.S_IRWXO:
            raise ConfigError(
                f"everyone on this machine can reach the key {files.key}",
                hint=f"chmod 600 {files.key}",
            )
        context.load_cert_chain(files.certificate, files.key)
        context.load_verify_locations(files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"cannot use certificate {files.certificate}, key {files.key}, CA {files.ca}: {error}",
            hint="make them with `understudy pki issue`",
        ) from error
    return context

"""TLS as all parts speak it: version 1.3 only, certificates on both sides, one private CA."""

import os
import ssl
import stat

from daemon.config import Section
from replication.errors import ConfigError


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

"""The config server's own certificate: issued by its CA for the names it is reached under, renewed
while it serves.

It can be made again at any time, so it is written without ceremony; its key is encrypted under a
key that the vault key gives.
"""

import datetime as dt
import os
import ssl
from collections.abc import Sequence

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from appliance.config_server.identity.keyring import Keyring
from daemon.certificates import (
    CLOCK_SKEW,
    COMMON_NAME_CHARS_MAX,
    SERVER,
    alternative_name,
    certificate_pem,
    new_key,
    read_certificate,
    subject,
    utc_now,
)
from daemon.durable import make_folder, write_whole
from daemon.identity import read_private
from daemon.tls import CONFIG_SERVER_UNIT
from replication.errors import PeerError

SERVER_FILE = "server.pem"
RENEWED_AT = 2 / 3


class ServerCertificate:
    """The certificate and the TLS context that shows it. The context stays the same object."""

    def __init__(
        self, keyring: Keyring, folder: str, names: Sequence[str], lifetime: dt.timedelta
    ) -> None:
        """Raises ConfigError for a name that is neither a DNS name nor an address."""
        self._keyring = keyring
        self._path = os.path.join(folder, SERVER_FILE)
        self._names = tuple(names)
        self._alternatives = {alternative_name(name) for name in names}
        self._lifetime = lifetime
        self._password = keyring.vault.derive("server key").hex()
        make_folder(folder)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        # Operators have no certificate; a route that is for nodes asks for one.
        self.context.verify_mode = ssl.CERT_OPTIONAL
        self.context.load_verify_locations(cadata=keyring.ca_pem)
        self.renew_if_due()

    def renew_if_due(self) -> bool:
        """Make a new one when there is none that fits; True when one was made.

        Connections that are open go on with the old one.
        """
        renewed = not self._fits() or not self._load()
        if renewed:
            self._issue()
            loaded = self._load()
            assert loaded, "a certificate that was just made can be used"
        return renewed

    def _fits(self) -> bool:
        """Whether what is there is of our CA, for our names, and young enough."""
        try:
            certificate = read_certificate(read_private(self._path))
            certificate.verify_directly_issued_by(self._keyring.ca.certificate)
            extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        except FileNotFoundError:
            return False
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, a new one is made
            structlog.get_logger().warning("server certificate passed over", reason=repr(error))
            return False
        begins = certificate.not_valid_before_utc + CLOCK_SKEW
        due = begins + (certificate.not_valid_after_utc - begins) * RENEWED_AT
        return set(extension.value) == self._alternatives and utc_now() < due

    def _issue(self) -> None:
        key = new_key()
        certificate = self._keyring.ca.issue(
            subject(self._names[0][:COMMON_NAME_CHARS_MAX], CONFIG_SERVER_UNIT),
            key.public_key(),
            usages=(SERVER,),
            lifetime=self._lifetime,
            names=self._names,
        )
        sealed_key = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(self._password.encode()),
        )
        write_whole(self._path, sealed_key + certificate_pem(certificate))

    def _load(self) -> bool:
        try:
            self.context.load_cert_chain(self._path, password=self._password)
        except (OSError, ssl.SSLError, PeerError):
            return False
        return True

"""Who this config server is, in one piece, and how it is opened."""

import asyncio
import contextlib
import datetime as dt
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import structlog

from appliance.config_server.api.limits import Rates
from appliance.config_server.identity.certificates import CertificateAuthority
from appliance.config_server.identity.config import IdentityConfig
from appliance.config_server.identity.enrolment import Enrolment
from appliance.config_server.identity.keyring import Keyring, open_keyring
from appliance.config_server.identity.passphrase import (
    Passphrase,
    read_passphrase,
    write_passphrase,
)
from appliance.config_server.identity.server_certificate import ServerCertificate
from appliance.config_server.identity.vault_key import VaultKey
from appliance.config_server.store.engine import Database
from replication.control.enrolment import PassphraseKind
from replication.errors import ConflictError, StorageError

IDENTITY_FOLDER = "identity"
RENEWAL_LOOK_SECONDS = 3600.0
CHALLENGES_PER_SECOND = 2.0
CHALLENGES_BURST = 100
"""From one address: many machines behind it may enrol at once, none may fill the table."""


def _challenge_rates() -> Rates:
    return Rates(CHALLENGES_PER_SECOND, CHALLENGES_BURST)


@dataclass(frozen=True, slots=True)
class Identity:
    """The keys of this config server and what is done with them.

    certificate:     its own; ``certificate.context`` is the TLS context to listen with.
    challenge_rates: how often an address may ask for a challenge.
    """

    keyring: Keyring
    authority: CertificateAuthority
    enrolment: Enrolment
    certificate: ServerCertificate
    challenge_rates: Rates = field(default_factory=_challenge_rates)

    @property
    def vault(self) -> VaultKey:
        return self.keyring.vault


@contextlib.asynccontextmanager
async def open_identity(
    config: IdentityConfig, state_folder: str, names: Sequence[str], database: Database
) -> AsyncIterator[Identity]:
    """Open what is there; make at the first start what is not. Raises ConfigError, StorageError."""
    folder = os.path.join(state_folder, IDENTITY_FOLDER)
    keyring = await open_keyring(folder, config.unlock_file, database)
    await ensure_passphrases(database, keyring.vault)
    lifetime = dt.timedelta(days=config.certificate_days)
    certificate = await asyncio.to_thread(ServerCertificate, keyring, folder, names, lifetime)
    renewing = asyncio.create_task(_keep_fresh(certificate), name="server certificate")
    try:
        yield Identity(
            keyring,
            CertificateAuthority(keyring.ca, lifetime),
            Enrolment(keyring),
            certificate,
        )
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing


async def ensure_passphrases(database: Database, vault: VaultKey) -> None:
    """Make the enrolment passphrases that are not there yet."""
    for kind in PassphraseKind:
        with contextlib.suppress(ConflictError):  # another config server made one just now
            async with database.writing() as session:
                if await read_passphrase(session, vault, kind) is None:
                    await write_passphrase(session, vault, kind, Passphrase.create())


async def _keep_fresh(certificate: ServerCertificate) -> None:
    while True:
        await asyncio.sleep(RENEWAL_LOOK_SECONDS)
        try:
            if await asyncio.to_thread(certificate.renew_if_due):
                structlog.get_logger().info("own certificate renewed")
        except StorageError as error:
            structlog.get_logger().warning("own certificate not renewed", reason=str(error))

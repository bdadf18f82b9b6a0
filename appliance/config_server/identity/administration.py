"""What an administrator does with the identity on the config server's own host. Each returns what
it is to print.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator

from appliance.config_server.audit import Audit
from appliance.config_server.caller import LOCAL_OPERATOR
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.identity.identity import IDENTITY_FOLDER, ensure_passphrases
from appliance.config_server.identity.keyring import Keyring, open_keyring, reseal
from appliance.config_server.identity.passphrase import (
    Passphrase,
    read_passphrase,
    write_passphrase,
)
from appliance.config_server.store.engine import Database, open_database
from replication.control.enrolment import PassphraseKind


async def show_passphrase(
    config: ConfigServerConfig, kind: PassphraseKind = PassphraseKind.MACHINES
) -> str:
    """The present enrolment passphrase of that kind; before the first start it is made."""
    async with _opened(config) as (database, keyring):
        await ensure_passphrases(database, keyring.vault)
        async with database.reading() as session:
            passphrase = await read_passphrase(session, keyring.vault, kind)
    assert passphrase is not None
    return passphrase.text


async def rotate_passphrase(
    config: ConfigServerConfig, kind: PassphraseKind = PassphraseKind.MACHINES
) -> str:
    """A new enrolment passphrase of that kind; the old one is worth nothing from now on."""
    async with _opened(config) as (database, keyring), database.writing() as session:
        passphrase = await write_passphrase(session, keyring.vault, kind, Passphrase.create())
        audit = Audit(database, time.time_ns)
        audit.add(session, LOCAL_OPERATOR, "passphrase.rotate", kind)
    return passphrase.text


async def show_ca(config: ConfigServerConfig, *, fingerprint: bool) -> str:
    """The CA's certificate as PEM, or the digest by which `understudy login` knows it."""
    async with _opened(config) as (_, keyring):
        if fingerprint:
            return f"sha256:{hashlib.sha256(keyring.ca_der).hexdigest()}"
        return keyring.ca_pem.strip()


async def change_unlock_file(config: ConfigServerConfig, new_unlock_file: str) -> str:
    """Seal the keyring under another unlock file."""
    reseal(_folder(config), config.identity.unlock_file, new_unlock_file)
    return f"the keyring is sealed under {new_unlock_file}: name it in identity.unlock_file now"


def _folder(config: ConfigServerConfig) -> str:
    return os.path.join(config.state_folder, IDENTITY_FOLDER)


@contextlib.asynccontextmanager
async def _opened(config: ConfigServerConfig) -> AsyncIterator[tuple[Database, Keyring]]:
    async with open_database(config.database_url()) as database:
        unlock_file = config.identity.unlock_file
        yield database, await open_keyring(_folder(config), unlock_file, database)

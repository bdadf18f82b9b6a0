"""The keys that make this config server what it is: the CA's and the vault's.

They lie in one sealed file, made once, by one rename: after a power cut it is there or it is not.
The database notes which keyring it belongs to, so that neither is ever used with another's.
"""

import base64
import contextlib
import datetime as dt
import hashlib
import os
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import select

from appliance.config_server.identity.unlock import read_unlock_file, seal, unseal
from appliance.config_server.identity.vault_key import VAULT_KEY_BYTES, VaultKey
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import Setting
from daemon.certificates import (
    Issuer,
    certificate_der,
    certificate_pem,
    key_pem,
    read_certificate,
    read_key,
)
from daemon.durable import make_folder, write_new, write_whole
from daemon.identity import read_private
from replication.errors import ConfigError, ConflictError

KEYRING_FILE = "keyring.sealed"
CA_NAME = "Understudy CA"
CA_LIFETIME = dt.timedelta(days=10 * 365)
SETTING = "keyring"


class _Keys(BaseModel):
    """What is sealed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ca_certificate: str
    ca_key: str
    vault_key: str


@dataclass(frozen=True, slots=True)
class Keyring:
    """The CA and the vault key."""

    ca: Issuer
    vault: VaultKey

    @classmethod
    def create(cls) -> "Keyring":
        return cls(Issuer.create(CA_NAME, CA_LIFETIME), VaultKey.create())

    @property
    def ca_der(self) -> bytes:
        return certificate_der(self.ca.certificate)

    @property
    def ca_pem(self) -> str:
        return certificate_pem(self.ca.certificate).decode()

    @property
    def fingerprint(self) -> str:
        """By which keyring and database know each other; tells nothing of the keys."""
        parts = self.ca_der, self.vault.derive("fingerprint")
        return hashlib.sha256(b"".join(parts)).hexdigest()


async def open_keyring(folder: str, unlock_file: str, database: Database) -> Keyring:
    """Open the keyring in ``folder``, or make one where neither it nor the database has any yet.

    Raises ConfigError for a wrong unlock file, a missing or a wrong keyring; nothing is written
    then. A process that is killed within leaves what the next one goes on from.
    """
    path = os.path.join(folder, KEYRING_FILE)
    unlock = read_unlock_file(unlock_file)
    noted = await _noted(database)
    try:
        keyring = _parse(unseal(read_private(path), unlock, path), path)
    except FileNotFoundError:
        if noted:
            raise ConfigError(
                f"{path} is missing, and the database belongs to one",
                hint="restore the identity folder from a backup, or copy it from the other config "
                "server of this database",
            ) from None
        make_folder(folder)
        with contextlib.suppress(FileExistsError):  # a command made one in the same moment
            write_new(path, _sealed(Keyring.create(), unlock))
        keyring = _parse(unseal(read_private(path), unlock, path), path)
    if not noted:
        await _note(database, keyring)
        noted = await _noted(database)
    if noted != keyring.fingerprint:
        raise ConfigError(
            f"{path} and the database are not of the same config server",
            hint="use the identity folder of the config server that made this database",
        )
    return keyring


def reseal(folder: str, unlock_file: str, new_unlock_file: str) -> None:
    """Seal the keyring under another unlock file; the old one opens it no more."""
    path = os.path.join(folder, KEYRING_FILE)
    try:
        sealed = read_private(path)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no keyring {path}") from error
    keyring = _parse(unseal(sealed, read_unlock_file(unlock_file), path), path)
    write_whole(path, _sealed(keyring, read_unlock_file(new_unlock_file)))


def _sealed(keyring: Keyring, unlock: bytes) -> bytes:
    keys = _Keys(
        ca_certificate=keyring.ca_pem,
        ca_key=key_pem(keyring.ca.key).decode(),
        vault_key=base64.b64encode(keyring.vault.reveal()).decode(),
    )
    return seal(keys.model_dump_json().encode(), unlock)


def _parse(content: bytes, path: str) -> Keyring:
    try:
        keys = _Keys.model_validate_json(content)
    except ValidationError as error:
        raise ConfigError(
            f"{path} is of another version; it is left as it is", hint="use the newer program"
        ) from error
    issuer = Issuer(read_certificate(keys.ca_certificate), read_key(keys.ca_key.encode(), path))
    vault_key = base64.b64decode(keys.vault_key)
    if len(vault_key) != VAULT_KEY_BYTES:
        raise ConfigError(f"{path} holds a vault key of {len(vault_key)} bytes")
    return Keyring(issuer, VaultKey(vault_key))


async def _noted(database: Database) -> str:
    async with database.reading() as session:
        value = await session.scalar(select(Setting.value).where(Setting.key == SETTING))
    return str(value["fingerprint"]) if value else ""


async def _note(database: Database, keyring: Keyring) -> None:
    try:
        async with database.writing() as session:
            session.add(Setting(key=SETTING, value={"fingerprint": keyring.fingerprint}))
    except ConflictError:
        return  # another config server was first; whose it is is looked at next

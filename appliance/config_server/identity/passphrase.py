"""The enrolment passphrases, one for machines and one for the appliance's parts: 160 random bits
each, in the database, sealed by the vault key.

All config servers of one database know the same ones; a new one counts at once everywhere.
"""

import asyncio
import base64
import secrets
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.identity.vault_key import VaultKey
from appliance.config_server.store.schema import Setting
from replication.control.enrolment import SALT_BYTES, PassphraseKind, derive_key

SETTINGS = {
    PassphraseKind.MACHINES: "enrolment",
    PassphraseKind.APPLIANCE: "enrolment-appliance",
}
PASSPHRASE_BYTES = 20
_GROUP_CHARS = 4


@dataclass(frozen=True, slots=True)
class Passphrase:
    """What people copy to a node, and the salt of the key that both sides derive from it."""

    text: str
    salt: bytes

    @classmethod
    def create(cls) -> "Passphrase":
        letters = base64.b32encode(secrets.token_bytes(PASSPHRASE_BYTES)).decode().lower()
        groups = [letters[i : i + _GROUP_CHARS] for i in range(0, len(letters), _GROUP_CHARS)]
        return cls("-".join(groups), secrets.token_bytes(SALT_BYTES))


async def read_passphrase(
    session: AsyncSession, vault: VaultKey, kind: PassphraseKind
) -> Passphrase | None:
    """The present one; none before the first start."""
    row = await session.get(Setting, SETTINGS[kind])
    if row is None:
        return None
    sealed = bytes.fromhex(str(row.value["passphrase"]))
    return Passphrase(
        vault.open(sealed, Setting.__tablename__, SETTINGS[kind]).decode(),
        bytes.fromhex(str(row.value["salt"])),
    )


async def write_passphrase(
    session: AsyncSession, vault: VaultKey, kind: PassphraseKind, passphrase: Passphrase
) -> Passphrase:
    """Make it the present one; challenges that are out are answered in vain."""
    sealed = vault.seal(passphrase.text.encode(), Setting.__tablename__, SETTINGS[kind])
    value = {"passphrase": sealed.hex(), "salt": passphrase.salt.hex()}
    await session.merge(Setting(key=SETTINGS[kind], value=value))
    return passphrase


class ProofKeys:
    """Derives the key of a passphrase once: it takes 50 ms, and anybody may ask for a challenge."""

    def __init__(self) -> None:
        self._derived: dict[PassphraseKind, tuple[Passphrase, bytes]] = {}
        self._turn = asyncio.Lock()

    async def of(self, kind: PassphraseKind, passphrase: Passphrase) -> bytes:
        """The key of the present passphrase of ``kind``; that of the one before is forgotten."""
        async with self._turn:
            known, key = self._derived.get(kind, (None, b""))
            if passphrase != known:
                key = await asyncio.to_thread(derive_key, passphrase.text, passphrase.salt)
                self._derived[kind] = passphrase, key
            return key

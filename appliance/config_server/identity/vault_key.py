"""The key under which the database keeps secrets: data keys, passwords of vCenters, the enrolment
passphrase.

What is sealed is bound to its place (table, row): copied elsewhere it opens no more.

    format    1 byte    1
    nonce     12 bytes  random
    sealed    n + 16    AES-256-GCM; associated data: format, "understudy vault", table, row

Source: NIST SP 800-38D.
"""

import secrets
import uuid

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from replication.errors import IntegrityError

VAULT_KEY_BYTES = 32
_FORMAT = b"\x01"
_NONCE_BYTES = 12


class VaultKey:
    """Seals and opens. Its bytes are never shown."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == VAULT_KEY_BYTES
        self._key = key
        self._cipher = AESGCM(key)

    @classmethod
    def create(cls) -> "VaultKey":
        return cls(secrets.token_bytes(VAULT_KEY_BYTES))

    def __repr__(self) -> str:
        return "VaultKey(…)"

    def seal(self, secret: bytes, table: str, row: uuid.UUID | str) -> bytes:
        """``secret`` sealed for one place of the database."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return _FORMAT + nonce + self._cipher.encrypt(nonce, secret, _FORMAT + _place(table, row))

    def open(self, sealed: bytes, table: str, row: uuid.UUID | str) -> bytes:
        """Raise IntegrityError when it was sealed elsewhere, by another key, or is damaged."""
        nonce, rest = sealed[1 : 1 + _NONCE_BYTES], sealed[1 + _NONCE_BYTES :]
        try:
            return self._cipher.decrypt(nonce, rest, sealed[:1] + _place(table, row))
        except (InvalidTag, ValueError) as error:
            raise IntegrityError(
                f"what {table} {row} keeps sealed cannot be opened",
                hint="database and identity folder must be of the same config server and backup",
            ) from error

    def derive(self, purpose: str) -> bytes:
        """Another key of 32 bytes, for ``purpose`` alone."""
        info = b"understudy vault " + purpose.encode()
        return HKDF(hashes.SHA256(), VAULT_KEY_BYTES, salt=None, info=info).derive(self._key)

    def reveal(self) -> bytes:
        """The key itself, for the keyring that keeps it sealed."""
        return self._key


def _place(table: str, row: uuid.UUID | str) -> bytes:
    parts = (b"understudy vault", table.encode(), str(row).encode())
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)

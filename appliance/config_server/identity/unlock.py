"""Sealing the keyring under what the operator keeps: a passphrase or a key in a file.

Source: RFC 7914 (scrypt), NIST SP 800-38D (AES-256-GCM).
"""

import base64
import binascii
import hashlib
import secrets
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import BaseModel, ConfigDict, ValidationError

from daemon.identity import read_private
from replication.errors import ConfigError, StorageError

UNLOCK_BYTES_MIN = 16
UNLOCK_BYTES_MAX = 4096
_COST = 1 << 15
_BLOCK = 8
_MEMORY_BYTES = 64 << 20
_PURPOSE = b"understudy keyring 1"


class SealedFile(BaseModel):
    """The file as it lies on the disk: JSON, so that a person sees what it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["understudy keyring 1"] = "understudy keyring 1"
    salt: str
    nonce: str
    sealed: str


def read_unlock_file(path: str) -> bytes:
    """Raise ConfigError when it is missing, too short, too long, or others may read it."""
    hint = f"make one: (umask 077; head -c 32 /dev/urandom | base64 > {path}), and keep a copy"
    try:
        content = read_private(path).strip()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no unlock file {path}", hint=hint) from error
    except StorageError as error:
        raise ConfigError(str(error.args[0]), hint="identity.unlock_file names it") from error
    if not UNLOCK_BYTES_MIN <= len(content) <= UNLOCK_BYTES_MAX:
        raise ConfigError(
            f"the unlock file {path} holds {len(content)} bytes, not {UNLOCK_BYTES_MIN} to "
            f"{UNLOCK_BYTES_MAX}",
            hint=hint,
        )
    return content


def seal(content: bytes, unlock: bytes) -> bytes:
    """The sealed file's bytes."""
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    sealed = AESGCM(_derive(unlock, salt)).encrypt(nonce, content, _PURPOSE)
    document = SealedFile(
        salt=salt.hex(), nonce=nonce.hex(), sealed=base64.b64encode(sealed).decode()
    )
    return document.model_dump_json(indent=1).encode() + b"\n"


def unseal(file: bytes, unlock: bytes, where: str) -> bytes:
    """Raise ConfigError that names ``where``: the wrong unlock file, or a damaged file."""
    try:
        document = SealedFile.model_validate_json(file)
        salt, nonce = bytes.fromhex(document.salt), bytes.fromhex(document.nonce)
        sealed = base64.b64decode(document.sealed, validate=True)
    except (ValidationError, ValueError, binascii.Error) as error:
        raise ConfigError(
            f"{where} is no sealed keyring of this version; it is left as it is",
            hint="restore it from a backup",
        ) from error
    try:
        return AESGCM(_derive(unlock, salt)).decrypt(nonce, sealed, _PURPOSE)
    except (InvalidTag, ValueError) as error:
        raise ConfigError(
            f"the unlock file does not open {where}; it is left as it is",
            hint="identity.unlock_file must be the one that it was made with; if it is, the "
            "keyring is damaged: restore it from a backup",
        ) from error


def _derive(unlock: bytes, salt: bytes) -> bytes:
    return hashlib.scrypt(unlock, salt=salt, n=_COST, r=_BLOCK, p=1, maxmem=_MEMORY_BYTES, dklen=32)

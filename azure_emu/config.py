"""What the Azure emulator is told: where its data lives, its ports, its storage account."""

import base64
import binascii
import os
import re
import stat
from typing import Annotated, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator

from daemon.config import DaemonConfig, Section
from daemon.service import ServiceConfig
from replication.errors import ConfigError

ACCOUNT_KEY_BYTES_MIN = 32
_ACCOUNT_NAME = re.compile(r"[a-z0-9]{3,24}")


def _account_name(name: str) -> str:
    if not _ACCOUNT_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no account name: 3 to 24 lower-case letters and digits")
    return name


Port = Annotated[int, Field(ge=1, le=65535)]


class Account(Section):
    """A storage account; its key is given here or in a file that only its owner can read."""

    name: Annotated[str, AfterValidator(_account_name)]
    key: SecretStr | None = None
    key_file: str | None = None

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if (self.key is None) == (self.key_file is None):
            raise ValueError("give either key or key_file")
        return self

    def read_key(self) -> str:
        """The key in base64. Raises ConfigError for a key that Azurite would not take.

        Azurite meets a malformed key by silently falling back to the account whose key
        everyone knows, so nothing malformed may reach it.
        """
        where = "storage.account.key"
        if self.key is not None:
            key = self.key.get_secret_value()
        else:
            assert self.key_file is not None
            where = self.key_file
            key = _read_private(self.key_file)
        try:
            raw = base64.b64decode(key, validate=True)
        except binascii.Error as error:
            raise ConfigError(
                f"{where}: not base64: {error}",
                hint="make one: head -c 64 /dev/urandom | base64 -w0",
            ) from error
        if len(raw) < ACCOUNT_KEY_BYTES_MIN:
            raise ConfigError(
                f"{where}: {len(raw)} bytes, at least {ACCOUNT_KEY_BYTES_MIN} are expected",
                hint="make one: head -c 64 /dev/urandom | base64 -w0",
            )
        return key


class Tls(Section):
    """Certificate chain and private key (PEM files) of the storage endpoints."""

    certificate: str
    key: str


class Storage(Section):
    """The cache storage account's service, played by Azurite."""

    data_folder: str
    host: str = "127.0.0.1"
    blob_port: Port = 10000
    queue_port: Port = 10001
    account: Account
    tls: Tls | None = None

    @model_validator(mode="after")
    def _two_ports(self) -> Self:
        if self.blob_port == self.queue_port:
            raise ValueError(f"blob_port and queue_port are both {self.blob_port}")
        return self


class Config(DaemonConfig):
    """The emulator's configuration file."""

    storage: Storage
    service: ServiceConfig = ServiceConfig()


def _read_private(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read().strip()
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the key file {path} is not text") from error
    if mode & 0o077:
        raise ConfigError(
            f"the key file {path} has mode {mode:04o}, others could read it",
            hint=f"chmod 600 {path}",
        )
    return content

"""Data keys on disk: 32 bytes in hexadecimal, in a file that is its owner's alone."""

import os
import stat

from replication.envelope import DATA_KEY_BYTES
from replication.errors import ConfigError


def read_data_key(path: str) -> bytes:
    """A key of DATA_KEY_BYTES in hexadecimal, in a file that is its owner's alone."""
    hint = "make one with `understudy pki data-key FILE`"
    try:
        with open(path, encoding="ascii") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigError(
                    f"the data key {path} can be read by others", hint=f"chmod 600 {path}"
                )
            key = bytes.fromhex(file.read(256).strip())
    except OSError as error:
        raise ConfigError(
            f"cannot read the data key {path}: {error.strerror}", hint=hint
        ) from error
    except ValueError as error:
        raise ConfigError(f"{path} holds no hexadecimal key", hint=hint) from error
    if len(key) != DATA_KEY_BYTES:
        raise ConfigError(f"{path} holds {len(key)} bytes, not {DATA_KEY_BYTES}", hint=hint)
    return key

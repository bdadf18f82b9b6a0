"""What a database refuses, in our own words and classes."""

import contextlib
import re
from collections.abc import Iterator

from sqlalchemy import exc

from replication.errors import (
    ConflictError,
    InputError,
    IntegrityError,
    ReplicationError,
    StorageError,
    UnavailableError,
)

_SQLITE: tuple[tuple[str, type[ReplicationError], str], ...] = (
    ("malformed", IntegrityError, "restore the database from a backup; it was not written to"),
    ("not a database", IntegrityError, "restore the database from a backup; it was not written to"),
    ("disk is full", StorageError, "free space on the disk of the state folder"),
    ("readonly", StorageError, "check owner, mode and mount options of the state folder"),
    ("unable to open", StorageError, "check owner, mode and mount options of the state folder"),
    ("i/o error", StorageError, "is the disk full, or does the kernel log tell of I/O errors?"),
    ("locked", UnavailableError, "another process writes to the database for long: try again"),
)
_SECRET = re.compile(r"://[^@/\s]*@")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn what the database raises within into errors of ours; parameters are never told."""
    try:
        yield
    except exc.IntegrityError as error:
        raise ConflictError(
            "what is to be written contradicts what is there", hint="read it again and decide anew"
        ) from error
    except exc.DataError as error:
        raise InputError("a value cannot be stored", hint="too large, or it holds a NUL") from error
    except OverflowError as error:  # SQLite's driver says it so
        raise InputError("a value cannot be stored", hint="it is too large") from error
    except exc.TimeoutError as error:
        raise UnavailableError("no connection to the database is free", hint="try again") from error
    except exc.DBAPIError as error:
        raise explain(error) from error


def explain(error: exc.DBAPIError) -> ReplicationError:
    """The class and the hint for what the driver says."""
    told = _SECRET.sub("://", str(error.orig)).strip().splitlines()
    message = f"the database refuses: {told[0] if told else type(error.orig).__name__}"
    for words, kind, hint in _SQLITE:
        if words in message.lower():
            return kind(message, hint=hint)
    return UnavailableError(message, hint="see that the database runs and can be reached")

"""Every way in which the process server says no, with its HTTP status and code.

Source: FORMAT.md §9.
"""

from collections.abc import Mapping
from enum import Enum

from replication.errors import (
    IntegrityError,
    OutOfOrderError,
    PeerError,
    ReplicationError,
    StorageError,
    UnavailableError,
)


class Kind(Enum):
    """A refusal's status and code."""

    PEER = 400, "peer"
    FORBIDDEN = 403, "forbidden"
    REVOKED = 403, "revoked"
    NOT_FOUND = 404, "not_found"
    TOO_SLOW = 408, "too_slow"
    OUT_OF_ORDER = 409, "out_of_order"
    CONFLICT = 409, "conflict"
    LENGTH_REQUIRED = 411, "length_required"
    TOO_LARGE = 413, "too_large"
    INTEGRITY = 422, "integrity"
    SPOOL_FULL = 429, "spool_full"
    QUOTA = 429, "quota"
    STORAGE = 507, "storage"
    UNAVAILABLE = 503, "unavailable"

    @property
    def status(self) -> int:
        return self.value[0]

    @property
    def code(self) -> str:
        return self.value[1]


CLOSING = frozenset({Kind.TOO_SLOW, Kind.TOO_LARGE, Kind.LENGTH_REQUIRED, Kind.REVOKED})
"""After these the rest of the request is not worth reading: the connection is closed."""

WAITING = frozenset({Kind.SPOOL_FULL, Kind.QUOTA, Kind.UNAVAILABLE, Kind.STORAGE})
"""These pass by themselves: the client is told when to try again."""


class RefusedError(PeerError):
    """A request was refused for a reason that only HTTP knows."""

    def __init__(self, kind: Kind, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind


_KINDS: Mapping[type[ReplicationError], Kind] = {
    OutOfOrderError: Kind.OUT_OF_ORDER,
    IntegrityError: Kind.INTEGRITY,
    StorageError: Kind.STORAGE,
    UnavailableError: Kind.UNAVAILABLE,
    PeerError: Kind.PEER,
}


def kind_of(error: ReplicationError) -> Kind | None:
    """How a client is told of ``error``; None for what is no answer to a client."""
    if isinstance(error, RefusedError):
        return error.kind
    return next((kind for known, kind in _KINDS.items() if isinstance(error, known)), None)

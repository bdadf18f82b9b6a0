"""The tree of errors that Understudy tells its users and its peers.

Policy: raise or handle, never log and go on. The docstring of a class tells an operator what
happened; the message says what, where and what was expected; ``hint`` says what to do. Broken
invariants of our own are ``assert``; nothing here is raised for them.

A retry is allowed where ``retryable`` says so. Integrity errors never are: the same bytes would
fail again, and only fresh bytes from the source can mend them.
"""

from typing import ClassVar


class ReplicationError(Exception):
    """Something that Understudy was asked to do could not be done."""

    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False
    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = str(self.args[0])
        return f"{message} ({self.hint})" if self.hint else message


class ConfigError(ReplicationError):
    """The configuration, a command's argument or a key file is unusable; nothing was changed."""

    exit_code = 2
    code = "config"


class PeerError(ReplicationError):
    """The other side sent something that the format or the protocol does not allow."""

    exit_code = 3
    code = "peer"


class OutOfOrderError(PeerError):
    """A changeset or a generation does not follow what is already held."""

    code = "out_of_order"


class UnavailableError(ReplicationError):
    """A service that is needed cannot be reached now; the work is kept and tried again."""

    exit_code = 4
    retryable = True
    code = "unavailable"


class StorageError(ReplicationError):
    """A disk, a file or the cache storage account refused to read or write."""

    exit_code = 5
    retryable = True
    code = "storage"


class IntegrityError(ReplicationError):
    """Bytes are not what their digest or tag says; they are refused and never served."""

    exit_code = 6
    code = "integrity"


class TrackingError(ReplicationError):
    """A disk cannot be tracked, or its tracking was interrupted, so changes may be unknown."""

    exit_code = 7
    code = "tracking"


class CaptureError(ReplicationError):
    """A consistency point could not be taken; the changes stay marked and go with the next one."""

    exit_code = 8
    retryable = True
    code = "capture"


class InputError(ReplicationError):
    """A request or a command asks for something that makes no sense; nothing was changed."""

    exit_code = 9
    code = "invalid"


class NotFoundError(ReplicationError):
    """What was asked for is not there."""

    exit_code = 10
    code = "not_found"


class ConflictError(ReplicationError):
    """Things stand otherwise than the request assumes; look at them again and decide anew."""

    exit_code = 11
    code = "conflict"


class AccessError(ReplicationError):
    """The caller's role does not allow it."""

    exit_code = 12
    code = "forbidden"


class UnknownCallerError(AccessError):
    """The caller shows no token or certificate, or one that is wrong, expired or revoked."""

    code = "unauthenticated"


class LimitError(ReplicationError):
    """Too much was asked in too short a time, or at once: it works again after a wait."""

    exit_code = 13
    retryable = True
    code = "limit"

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after_seconds: float = 1.0
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after_seconds = retry_after_seconds

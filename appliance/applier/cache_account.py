"""The cache storage account as the applier sees it: containers, blobs, leases, wake-up messages.

Two accounts have this shape: Azure Blob Storage (``azure_account``) and a folder
(``folder_account``) for what came on a medium. Neither one's word is taken: whoever reads checks
what it reads, and a blob that was there may be gone.

Source: FORMAT.md §7.
"""

import uuid
from collections.abc import Container
from dataclasses import dataclass
from typing import Protocol

from replication.errors import StorageError

API_VERSION_DEFAULT = "2026-06-06"
"""Of the Azure storage services: the newest that Azurite knows."""

LEASE_SECONDS = 60
"""How long a lease holds without being held again."""

WAKE_COUNT_MAX = 32
"""Messages taken from the queue at once."""

CONTAINERS_LISTED_MAX = 100_000
"""Of one machine: more than six million changesets."""

BLOBS_LISTED_MAX = 100_000
"""Below one prefix; a changeset has 8192 segments at most."""


@dataclass(frozen=True, slots=True)
class CacheBlob:
    """A blob as a listing shows it.

    version: another one whenever the blob is put again; means nothing else.
    """

    name: str
    size_bytes: int
    version: str


def refuse_endless(what: str, count: int, count_max: int) -> None:
    """Raise StorageError for a listing that is longer than what anybody of us makes."""
    if count > count_max:
        raise StorageError(
            f"there are more than {count_max} {what} in the cache storage account",
            hint="they are not Understudy's: see who else writes there",
        )


class CacheAccount(Protocol):
    """What an applier needs of a cache storage account.

    All methods raise UnavailableError when the account cannot be reached and StorageError when it
    refuses; both may be tried again.
    """

    async def containers(self, prefix: str) -> list[str]:
        """Names of the containers that begin with ``prefix``, sorted."""

    async def blobs(self, container: str, prefix: str) -> list[CacheBlob]:
        """Blobs whose names begin with ``prefix``, by name; none when the container is missing."""

    async def read(self, container: str, name: str, bytes_max: int) -> bytes | None:
        """A blob's bytes; None when it cannot be had and must be put again.

        Of a blob that is longer than ``bytes_max`` it may be any ``bytes_max + 1`` bytes or more.
        """

    async def write(self, container: str, name: str, data: bytes) -> None:
        """Put a blob over whatever is there, making the container where it is missing."""

    async def drop(self, container: str) -> None:
        """Delete a container with all that is in it; fine when it is missing."""

    async def hold(self, name: str, owner: uuid.UUID) -> bool:
        """Take the lease on CONTROL_CONTAINER's blob ``name``, or hold it for LEASE_SECONDS more.

        False: another owner has it.
        """

    async def release(self, name: str, owner: uuid.UUID) -> None:
        """Give the lease up, if ``owner`` has it."""

    async def wakes(self, mine: Container[str]) -> set[str]:
        """Texts of the messages that wait in the queue; those that are ``mine`` are used up."""

    async def close(self) -> None:
        """Let the connections go."""

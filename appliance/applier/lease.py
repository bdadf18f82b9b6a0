"""Which applier owns a machine: a blob's lease, held again long before it ends.

The lease keeps two appliers with two stores apart; the store's own lock keeps two processes off
one store. A cache that is away, or that has forgotten the lease in a crash, takes nothing from
the owner: only somebody else's lease does.
"""

import asyncio
import contextlib
import socket
import uuid
from enum import Enum

from appliance.applier.cache_account import LEASE_SECONDS, CacheAccount
from replication.cache_layout import lease_name
from replication.errors import StorageError, UnavailableError

HOLD_SECONDS = 20.0
"""Between two holds; three of them fit into a lease."""

RETRY_SECONDS = 5.0
assert HOLD_SECONDS * 3 <= LEASE_SECONDS


class Ownership(Enum):
    """What is known of a machine's lease."""

    UNKNOWN = "unknown"
    """The cache has not answered yet."""

    OURS = "ours"
    """We hold it, or held it when the cache last answered."""

    TAKEN = "taken"
    """Another applier holds it."""


def lease_owner(applier: uuid.UUID) -> uuid.UUID:
    """The lease id of an applier: the same after a restart, so that it takes its own lease again
    at once, and another one for a copy of its store on another host.
    """
    return uuid.uuid5(applier, socket.gethostname())


class MachineLease:
    """One machine's lease.

    ownership: what is known of it.
    reachable: whether the cache answered last time.
    """

    def __init__(
        self,
        account: CacheAccount,
        machine: uuid.UUID,
        owner: uuid.UUID,
        changed: asyncio.Event,
    ) -> None:
        """``changed`` is set whenever ``ownership`` or ``reachable`` becomes another one."""
        self._account = account
        self._name = lease_name(machine)
        self._owner = owner
        self.ownership = Ownership.UNKNOWN
        self.reachable = True
        self._changed = changed

    async def keep(self) -> None:
        """Hold the lease until cancelled."""
        while True:
            answered = await self._hold()
            ours = answered and self.ownership is Ownership.OURS
            await asyncio.sleep(HOLD_SECONDS if ours else RETRY_SECONDS)

    async def release(self) -> None:
        """Let another applier have the machine at once."""
        if self.ownership is Ownership.OURS:
            with contextlib.suppress(UnavailableError, StorageError):
                await self._account.release(self._name, self._owner)

    async def _hold(self) -> bool:
        before = (self.ownership, self.reachable)
        try:
            held = await self._account.hold(self._name, self._owner)
        except (UnavailableError, StorageError):
            self.reachable = False
        else:
            self.reachable = True
            self.ownership = Ownership.OURS if held else Ownership.TAKEN
        if before != (self.ownership, self.reachable):
            self._changed.set()
        return self.reachable

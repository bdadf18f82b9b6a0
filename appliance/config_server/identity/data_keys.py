"""Machines' data keys: made once, kept sealed by the vault key, given to those who may have them.

Source: docs/CONTROL.md §3.
"""

import secrets
import time
import uuid
from collections.abc import Callable

from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.limits import Rates
from appliance.config_server.identity.vault_key import VaultKey
from appliance.config_server.store.schema import DataKey, Machine
from replication.control.assignment import MACHINE_COUNT_MAX
from replication.control.role import NodeRole
from replication.envelope import DATA_KEY_BYTES
from replication.errors import AccessError, NotFoundError


class KeyRates:
    """How often a node may ask for data keys, since each time is in the audit log.

    An applier keeps what it was given; at first it fetches one for each of its machines.
    """

    def __init__(self, per_minute: float, *, now: Callable[[], float] = time.monotonic) -> None:
        self._rates = {
            role: Rates(per_minute / 60, burst, now=now)
            for role, burst in (
                (NodeRole.MACHINE, max(1, int(per_minute))),
                (NodeRole.APPLIER, MACHINE_COUNT_MAX),
            )
        }

    def take(self, role: NodeRole, node: uuid.UUID) -> float:
        """0 when the node may ask now, else the seconds until it may."""
        return self._rates[role].take(str(node))


async def ensure(session: AsyncSession, vault: VaultKey, machine: uuid.UUID, now_ns: int) -> None:
    """Make the machine's data key if it has none. Raises ConflictError to the slower of two."""
    if await session.get(DataKey, machine) is None:
        wrapped = vault.seal(secrets.token_bytes(DATA_KEY_BYTES), DataKey.__tablename__, machine)
        session.add(DataKey(machine_id=machine, wrapped=wrapped, created_ns=now_ns))
        await session.flush()


async def give(
    session: AsyncSession, vault: VaultKey, machine: uuid.UUID, *, node: uuid.UUID, role: NodeRole
) -> bytes:
    """The data key, to the machine's own agent or to the applier that it is assigned to.

    Raises AccessError, NotFoundError while the machine was never protected, IntegrityError.
    """
    row = await session.get(Machine, machine)
    own = role is NodeRole.MACHINE and node == machine
    assigned = role is NodeRole.APPLIER and row is not None and row.applier_id == node
    if not own and not assigned:
        raise AccessError(f"the data key of {machine} is not for {role} {node}")
    key = await session.get(DataKey, machine)
    if key is None:
        raise NotFoundError(
            f"{machine} has no data key", hint="it gets one when it is protected: try again then"
        )
    return vault.open(key.wrapped, DataKey.__tablename__, machine)

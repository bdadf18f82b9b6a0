"""Whether the point and the network that are asked for can be had: told before a job begins.

Source: docs/RECOVERY.md §2, §3.
"""

import uuid

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import newest_of
from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.workflow import store_of
from appliance.config_server.recovery.intake import stored_points
from appliance.config_server.recovery.run import OPEN, FailoverKind
from appliance.config_server.store.recovery_tables import Failover
from appliance.config_server.store.schema import Machine, Node
from replication.bookmark import Consistency
from replication.control.recovery import PointChoice
from replication.errors import ConflictError, NotFoundError

NETWORK = "default"
"""Of failovers where none is asked for."""


async def refuse_missing_point(asking: Asking, machine: Machine, choice: str) -> None:
    """Raises NotFoundError for a point that the machine's applier has not listed.

    Where it has listed none yet, or has more than it has listed (the list has room for the newest
    ones, and a new point is counted before it is listed), what it answers to the hold decides.
    """
    if choice in (PointChoice.LATEST, PointChoice.LATEST_PROCESSED):
        return
    points = await stored_points(asking.session, machine)
    applier = await asking.session.get_one(Node, machine.applier_id) if points else None
    heard = newest_of(applier, asking.ports.newest(applier.id)) if applier is not None else None
    store = store_of(heard, machine.id)
    if store is None or store.point_count > len(points):
        return
    hint = f"`understudy points {machine.name}` lists those that there are"
    if choice == PointChoice.LATEST_APP_CONSISTENT:
        if not any(point.consistency == Consistency.APP.value for point in points):
            raise NotFoundError(
                f"{machine.name} has no app-consistent recovery point",
                hint=f"{hint}; its policy says how often an app-consistent one is made",
            )
    elif choice not in {point.name for point in points}:
        raise NotFoundError(f"{machine.name} has no recovery point {choice}", hint=hint)


async def refuse_shared_network(
    session: AsyncSession, kind: FailoverKind, compute: uuid.UUID, network: str
) -> None:
    """Raises ConflictError where a test and a failover would have the same network.

    That of a test is isolated, that of a failover is not: a compute node gives neither the other's.
    A test that took the one that failovers have by default would stand in their way.
    """
    is_test = kind is FailoverKind.TEST
    if is_test and network == NETWORK:
        raise ConflictError(
            f"the network {network} is that of failovers; a test's is isolated",
            hint="name another --network, or none: the test gets one of its own",
        )
    kinds = [each for each in FailoverKind if (each is FailoverKind.TEST) is not is_test]
    other = await session.scalar(
        select(Failover)
        .where(
            Failover.compute_id == compute,
            Failover.network == network,
            Failover.state.in_(OPEN),
            Failover.kind.in_(kinds),
        )
        .limit(1)
    )
    if other is not None and is_test:
        raise ConflictError(
            f"the network {network} is that of the failover of {other.machine}; a test's is "
            "isolated",
            hint="name another --network, or none: the test gets one of its own",
        )
    if other is not None:
        raise ConflictError(
            f"the network {network} is isolated: the test of {other.machine} is on it",
            hint=f"name another --network, or `understudy failover cleanup {other.machine}`",
        )

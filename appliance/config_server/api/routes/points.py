"""``machines/{machine}/points``: recovery points to choose from, and locks on them.

Source: docs/RECOVERY.md §2, §8.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated

from fastapi import Path
from pydantic import BaseModel, ConfigDict
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, decode_cursor, encode_cursor
from appliance.config_server.api.router import Count64, Router, ServerOf
from appliance.config_server.api.routes.machines import Reference
from appliance.config_server.caller import Caller
from appliance.config_server.protection.machines import find_node, heard_of, lock_machine
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.intake import listed_points
from appliance.config_server.recovery.locking import lock_point
from appliance.config_server.server import Server
from appliance.config_server.store.schema import Machine, Node
from replication.control.recovery import ListedPoint
from replication.control.role import OperatorRole
from replication.errors import ConflictError

router = Router("machines")
PointInPath = Annotated[str, Path(min_length=1, max_length=255, pattern=r"^[^/\x00]+$")]


class PointDocument(BaseModel):
    """A recovery point. Times in nanoseconds since 1970; ``time_ns`` by the source's clock.

    verified_ns:     when its blocks were last checked; 0: never yet.
    held:            a virtual machine is made from it.
    locked_until_ns: it cannot be deleted before; 0: no lock.
    """

    name: str
    time_ns: int
    applied_ns: int
    consistency: str
    reason: str
    changed_bytes: int
    verified_ns: int
    held: bool
    locked_until_ns: int

    @classmethod
    def of(cls, point: ListedPoint) -> "PointDocument":
        return cls.model_validate(point.model_dump(exclude={"position"}))


class LockRequest(BaseModel):
    """until_ns: nanoseconds since 1970; later than now, and than the lock that there is."""

    model_config = ConfigDict(extra="forbid")

    until_ns: Count64


class LockDocument(BaseModel):
    """A lock on a point. Whether its applier holds it already, the list of points tells."""

    machine: str
    point: str
    until_ns: int


@router.get("/{machine}/points")
async def list_points(
    server: ServerOf,
    paging: PagingOf,
    machine: Reference,
    _: Annotated[Caller, needs(OperatorRole.READER)],
) -> Page[PointDocument]:
    """List a machine's recovery points, the newest first, as its applier has told of them last."""
    async with server.database.reading() as session:
        node = await find_node(session, machine, server.clock())
        row = await session.get(Machine, node.id)
        points = await _points(server, session, row) if row is not None else []
    if paging.cursor is not None:
        (before,) = decode_cursor(paging.cursor, [int])
        points = [point for point in points if point.position < before]
    some = points[: paging.limit]
    following = encode_cursor([some[-1].position]) if len(points) > len(some) else None
    return Page(items=[PointDocument.of(point) for point in some], next=following)


async def _points(server: Server, session: AsyncSession, machine: Machine) -> Sequence[ListedPoint]:
    applier = await session.get(Node, machine.applier_id) if machine.applier_id else None
    heard = heard_of(server.protection.ports, applier) if applier is not None else None
    return await listed_points(session, machine, heard)


@router.post("/{machine}/points/{point}/lock", status_code=HTTPStatus.OK)
async def lock(
    server: ServerOf,
    caller: Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)],
    machine: Reference,
    point: PointInPath,
    request: LockRequest,
) -> LockDocument:
    """Have a point kept until a date. A lock may be made longer, never shorter."""
    detail = {"point": point, "until_ns": request.until_ns}
    async with server.change(caller, "point.lock", machine, detail) as session:
        node = await find_node(session, machine, server.clock())
        row = await lock_machine(session, node.id)
        if row is None:
            raise ConflictError(f"{node.name} is not protected: it has no points")
        asking = Asking(session, server.protection.ports, server.clock(), caller.name)
        await lock_point(asking, row, point, request.until_ns)
        return LockDocument(machine=row.name, point=point, until_ns=request.until_ns)

"""A process server or an applier gets as many machines as its assignment can name, and no more."""

import asyncio
import time
import uuid
from typing import Any

import pytest
from sqlalchemy import insert, select

from appliance.config_server.nodes.part import open_nodes
from appliance.config_server.protection import requests
from appliance.config_server.protection.placement import PlacementError
from appliance.config_server.protection.requests import Asking
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import Job, Machine, Node
from replication.control.assignment import (
    MACHINE_COUNT_MAX,
    ApplierAssignment,
    ProcessServerAssignment,
)
from tests.appliance.config_server.protection.stage import (
    APPLIER,
    MACHINE,
    SERVER,
    Nodes,
    certificate,
    furnish,
)

SECOND = uuid.UUID(int=4)
_FIRST_OTHER = 1000


async def open_scene(database: Database, others: int, *, state: str, points: str) -> Nodes:
    """``others`` machines have SERVER and APPLIER already; two more are enrolled."""
    await furnish(database, time.time_ns)
    ids = [uuid.UUID(int=_FIRST_OTHER + number) for number in range(others)]
    node = {"role": "machine", "enrolled_ns": 0, "assignment_version": 1, "seen_ns": 0}
    machine = {"state": state, "points": points, "since_ns": 0, "applier_id": APPLIER}
    machine["process_server_id"] = SERVER if state != "unprotected" else None
    async with database.writing() as session:
        session.add(Node(id=SECOND, role="machine", name="web-2", enrolled_ns=time.time_ns()))
        await session.flush()
        session.add(certificate(SECOND, time.time_ns()))
        await session.execute(insert(Node), [{**node, "id": one, "name": str(one)} for one in ids])
        await session.execute(
            insert(Machine), [{**machine, "id": one, "name": str(one)} for one in ids]
        )
    nodes = Nodes(database, time.time_ns)
    await nodes.report()
    return nodes


async def protect(database: Database, nodes: Nodes, name: str, **options: Any) -> Job:
    async with database.writing() as session:
        asking = Asking(session, nodes.ports, time.time_ns(), "alice")
        return await requests.protect(asking, name, policy="gold", **options)


@pytest.mark.parametrize("asked", [{}, {"process_server": "ps-1"}])
async def test_one_more_than_a_process_server_can_have_is_refused(
    database_url: str, asked: dict[str, str]
) -> None:
    async with open_database(database_url) as database:
        nodes = await open_scene(database, MACHINE_COUNT_MAX - 1, state="protected", points="kept")
        assert (await protect(database, nodes, "web-1", **asked)).target == "web-1"
        with pytest.raises(PlacementError, match=f"it has {MACHINE_COUNT_MAX} machines, and can"):
            await protect(database, nodes, "web-2", **asked)
        async with open_nodes(database, time.time_ns) as part, database.reading() as session:
            for node, kind in ((SERVER, ProcessServerAssignment), (APPLIER, ApplierAssignment)):
                row = await session.get_one(Node, node)
                told = await part.assignment(session, row, time.time_ns())
                assert isinstance(told, ProcessServerAssignment | ApplierAssignment)
                assert isinstance(told, kind)
                assert len(told.machines) == MACHINE_COUNT_MAX
            assert await session.scalar(select(Machine.id).where(Machine.id == SECOND)) is None


@pytest.mark.parametrize("points", ["kept", "removing"])
async def test_machines_whose_points_an_applier_has_take_room_of_it(
    database_url: str, points: str
) -> None:
    async with open_database(database_url) as database:
        nodes = await open_scene(database, MACHINE_COUNT_MAX, state="unprotected", points=points)
        with pytest.raises(PlacementError, match="applier-1"):
            await protect(database, nodes, "web-1", applier="applier-1")


async def test_a_machine_takes_no_room_of_itself(database_url: str) -> None:
    async with open_database(database_url) as database:
        nodes = await open_scene(database, MACHINE_COUNT_MAX - 1, state="protected", points="kept")
        async with database.writing() as session:
            session.add(
                Machine(
                    id=MACHINE,
                    name="web-1",
                    state="unprotected",
                    since_ns=0,
                    applier_id=APPLIER,
                    points="kept",
                )
            )
        assert (await protect(database, nodes, "web-1")).target == "web-1"


async def test_of_two_at_once_one_gets_the_last_room(database_url: str) -> None:
    async with open_database(database_url) as database:
        nodes = await open_scene(database, MACHINE_COUNT_MAX - 1, state="protected", points="kept")
        told = await asyncio.gather(
            *(protect(database, nodes, name) for name in ("web-1", "web-2")),
            return_exceptions=True,
        )
        assert sorted(type(one).__name__ for one in told) == ["Job", "PlacementError"]

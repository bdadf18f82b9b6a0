"""A config server of all real parts, in this process: its API over ASGI, with callers of all roles.

Example::

    async with open_rig(tmp_path) as rig:
        operator = rig.operator(OperatorRole.CONTRIBUTOR)      # an httpx.AsyncClient with a token
        agent = rig.node(await rig.enrol(NodeRole.MACHINE))    # the same with a certificate
        await operator.get("policies")                         # below /api/v1/
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.types import Receive, Scope, Send

from appliance.config_server.api.app import create_app
from appliance.config_server.api.peer import SCOPE_KEY, Peer
from appliance.config_server.api.router import PREFIX
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.server import Server, open_server
from appliance.config_server.store.schema import Certificate, Node
from appliance.config_server.tokens import create_token
from daemon.service import Health, Service
from replication.control.role import NodeRole, OperatorRole

DAY_NS = 86400 * 10**9
UNLIMITED = {
    "requests_per_second": 1e6,
    "requests_burst": 10**6,
    "node_requests_per_second": 1e6,
    "node_requests_burst": 10**6,
}


@dataclass(slots=True)
class Clock:
    """A clock that a test can move; otherwise it goes like the real one."""

    ahead_ns: int = 0

    def __call__(self) -> int:
        return time.time_ns() + self.ahead_ns


@dataclass(slots=True)
class Rig:
    """A running server and those who call it. ``tokens``: one of each role."""

    server: Server
    app: FastAPI
    clock: Clock
    tokens: dict[OperatorRole, str] = field(default_factory=dict)

    async def token(self, role: OperatorRole, *, name: str = "", days: int = 30) -> str:
        """A new token."""
        async with self.server.database.writing() as session:
            new = await create_token(
                session,
                name or f"{role}-{uuid.uuid4().hex[:8]}",
                role,
                days=days,
                now_ns=self.clock(),
                created_by="the rig",
            )
        return new.secret

    async def enrol(self, role: NodeRole, *, node: uuid.UUID | None = None, **columns: Any) -> Peer:
        """A node with a certificate, as the database has them; nobody can speak TLS with it."""
        peer = Peer(node or uuid.uuid4(), role, uuid.uuid4().hex)
        columns.setdefault("name", f"{role}-{peer.node.hex[:8]}")
        async with self.server.database.writing() as session:
            session.add(Node(id=peer.node, role=role, enrolled_ns=self.clock(), **columns))
            await session.flush()
            session.add(
                Certificate(
                    serial=peer.serial,
                    node_id=peer.node,
                    key_digest="0" * 64,
                    issued_ns=self.clock(),
                    expires_ns=self.clock() + 90 * DAY_NS,
                )
            )
        return peer

    def client(
        self, *, token: str | None = None, peer: Peer | None = None, source: str = "192.0.2.7"
    ) -> httpx.AsyncClient:
        """Who calls from ``source`` with a token, or a certificate, or neither."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"] = {SCOPE_KEY: peer}
            await self.app(scope, receive, send)

        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app, client=(source, 50000)),
            base_url=f"https://config-server{PREFIX}/",
            headers={"authorization": f"Bearer {token}"} if token else {},
        )

    def operator(self, role: OperatorRole = OperatorRole.CONTRIBUTOR) -> httpx.AsyncClient:
        """Who calls with the rig's token of ``role``."""
        return self.client(token=self.tokens[role])

    def node(self, peer: Peer) -> httpx.AsyncClient:
        """A node that was enrolled."""
        return self.client(peer=peer)


@contextlib.asynccontextmanager
async def open_rig(folder: Path, **config: Any) -> AsyncIterator[Rig]:
    """A server with its state in ``folder``; ``config`` as in the configuration file."""
    tree: dict[str, Any] = {"state_folder": str(folder / "state"), **config}
    unlock_file = folder / "unlock"
    if not unlock_file.exists():
        unlock_file.touch(0o600)
        unlock_file.write_text("the tests' own unlock passphrase")
    tree.setdefault("identity", {"unlock_file": str(unlock_file)})
    tree.setdefault("limits", UNLIMITED)
    clock = Clock()
    service = Service(asyncio.Event(), Health(), CollectorRegistry())
    async with open_server(ConfigServerConfig.model_validate(tree), service, clock=clock) as server:
        rig = Rig(server, create_app(server), clock)
        for role in OperatorRole:
            rig.tokens[role] = await rig.token(role)
        yield rig

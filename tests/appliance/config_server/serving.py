"""The rig's API behind the real HTTPS port, with a CA and certificates of the tests' own."""

import asyncio
import contextlib
import datetime as dt
import ssl
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from appliance.config_server.api.listener import listen
from appliance.config_server.api.peer import Peer
from appliance.config_server.api.router import PREFIX
from appliance.config_server.config import LimitConfig, ListenConfig
from appliance.config_server.store.schema import Certificate, Node
from daemon.certificates import (
    CLIENT,
    SERVER,
    Issuer,
    certificate_pem,
    key_digest,
    key_pem,
    new_key,
    serial_text,
    subject,
)
from replication.control.role import NodeRole
from tests.appliance.config_server.running import Rig

LIFETIME = dt.timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Authority:
    """A CA whose files are in ``folder``."""

    issuer: Issuer
    folder: Path

    @classmethod
    def create(cls, folder: Path) -> "Authority":
        folder.mkdir()
        issuer = Issuer.create("test CA", LIFETIME)
        (folder / "ca.pem").write_bytes(certificate_pem(issuer.certificate))
        return cls(issuer, folder)

    def issue(self, name: str, unit: str = "", *, names: tuple[str, ...] = ()) -> Path:
        """A file with a certificate and its key; its serial number is its name's."""
        key = new_key()
        certificate = self.issuer.issue(
            subject(name, unit),
            key.public_key(),
            usages=[SERVER if names else CLIENT],
            lifetime=LIFETIME,
            names=names,
        )
        path = self.folder / f"{serial_text(certificate.serial_number)}.pem"
        path.write_bytes(certificate_pem(certificate) + key_pem(key))
        return path

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_OPTIONAL
        context.load_cert_chain(self.issue("server", names=("localhost", "127.0.0.1")))
        context.load_verify_locations(self.folder / "ca.pem")
        return context

    def client_context(self, certificate: Path | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.folder / "ca.pem"))
        if certificate:
            context.load_cert_chain(certificate)
        return context


@dataclass(frozen=True, slots=True)
class Port:
    """An open port with ``rig``'s API."""

    rig: Rig
    number: int
    authority: Authority

    def client(
        self, *, token: str | None = None, certificate: Path | None = None, **options: Any
    ) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"https://localhost:{self.number}{PREFIX}/",
            headers={"authorization": f"Bearer {token}"} if token else {},
            verify=self.authority.client_context(certificate),
            **options,
        )

    async def enrol(self, role: NodeRole) -> tuple[Peer, Path]:
        """A node that really has a certificate."""
        node = uuid.uuid4()
        path = self.authority.issue(str(node), role)
        peer = Peer(node, role, path.stem)
        async with self.rig.server.database.writing() as session:
            session.add(Node(id=node, role=role, enrolled_ns=self.rig.clock(), name=str(node)))
            await session.flush()
            session.add(
                Certificate(
                    serial=peer.serial,
                    node_id=node,
                    key_digest=key_digest(new_key().public_key()),
                    issued_ns=self.rig.clock(),
                    expires_ns=self.rig.clock() + int(LIFETIME.total_seconds() * 10**9),
                )
            )
        return peer, path

    @contextlib.asynccontextmanager
    async def wire(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection for bytes that no client library would send."""
        reader, writer = await asyncio.open_connection(
            "localhost", self.number, ssl=self.authority.client_context()
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def open_port(rig: Rig, folder: Path) -> AsyncIterator[Port]:
    """Serve ``rig`` on a free port, within the limits that its configuration has."""
    authority = Authority.create(folder / "authority")
    limits: LimitConfig = rig.server.config.limits
    where = ListenConfig(host="127.0.0.1", port=0)
    async with listen(rig.app, authority.server_context(), where, limits) as number:
        yield Port(rig, number, authority)

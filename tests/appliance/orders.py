"""A config server's side of the wire, as nodes see it: assignments, reports, data keys over TLS.

It gives whatever a test wants it to give, also what the config server itself never would. Nodes
find their identity folder ready, as enrolment leaves it.
"""

import asyncio
import datetime as dt
import json
import ssl
import time
import uuid
from pathlib import Path
from typing import Any, Self

from aiohttp import web

from daemon.certificates import (
    CLIENT,
    SERVER,
    Issuer,
    SigningRequest,
    certificate_pem,
    key_pem,
    new_key,
    serial_text,
    subject,
)
from daemon.durable import make_folder, write_whole
from daemon.identity import CA_FILE, NODE_FILE, PAIR_FILE, NodeIdentity, NodeRecord, load
from daemon.tls import CONFIG_SERVER_UNIT, TlsFiles
from replication.control.assignment import Assignment
from replication.control.enrolment import Enrolled
from replication.control.message import Message
from replication.control.recovery import Evidence, EvidenceKind
from replication.control.report import ReportAnswer
from replication.control.role import NodeRole

LIFETIME = dt.timedelta(days=30)
WAIT_SECONDS = 2.0


class Orders:
    """Listens on 127.0.0.1 while it is open; ``leave`` and ``come_back`` make it be away.

    reports: the newest of each node, as it came.
    asked:   nodes and machines whose data keys were asked for, in order.
    points:  the newest list of points of each machine; lists: how many came.
    evidence: the newest of each VM and kind.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._port = port
        self._issuer = Issuer.create("test CA", LIFETIME)
        self._assignments: dict[uuid.UUID, Message] = {}
        self._changed = asyncio.Condition()
        self._runner: web.AppRunner | None = None
        self.reports: dict[uuid.UUID, dict[str, Any]] = {}
        self.data_keys: dict[uuid.UUID, bytes] = {}
        self.asked: list[tuple[uuid.UUID, uuid.UUID]] = []
        self.key_seconds = 0.0
        self.points: dict[uuid.UUID, dict[str, Any]] = {}
        self.lists = 0
        self.takes_points = True
        self.evidence: dict[tuple[uuid.UUID, EvidenceKind], bytes] = {}
        make_folder(str(folder))
        write_whole(str(folder / CA_FILE), certificate_pem(self._issuer.certificate))
        self._server = self._pair("config-server", CONFIG_SERVER_UNIT, ("127.0.0.1",))

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self.come_back()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.leave()

    async def come_back(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._server)
        context.load_verify_locations(self._folder / CA_FILE)
        app = web.Application()
        app.add_routes(
            [
                web.get("/api/v1/node/assignment", self._give_assignment),
                web.post("/api/v1/node/reports", self._take_report),
                web.post("/api/v1/node/points", self._take_points),
                web.post("/api/v1/node/certificate", self._renew),
                web.get("/api/v1/node/data-keys/{machine}", self._give_data_key),
                web.post("/api/v1/node/evidence/{vm}/{kind}", self._take_evidence),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self._port, ssl_context=context).start()

    async def leave(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def assign(self, node: uuid.UUID, assignment: Assignment) -> None:
        async with self._changed:
            self._assignments[node] = assignment
            self._changed.notify_all()

    def identity(
        self,
        folder: Path,
        role: NodeRole,
        node: uuid.UUID | None = None,
        *,
        name: str = "node",
        lifetime: dt.timedelta = LIFETIME,
    ) -> NodeIdentity:
        """A folder as enrolment leaves it; with the same ``node`` again: a new certificate."""
        record = NodeRecord(id=node or uuid.uuid4(), role=role, name=name)
        pair = self._pair(str(record.id), role.value, ("127.0.0.1",), lifetime)
        make_folder(str(folder))
        write_whole(str(folder / NODE_FILE), record.model_dump_json().encode())
        write_whole(str(folder / CA_FILE), certificate_pem(self._issuer.certificate))
        write_whole(str(folder / PAIR_FILE), Path(pair).read_bytes())
        return load(str(folder))

    def machine_tls(self, machine: uuid.UUID, role: NodeRole = NodeRole.MACHINE) -> TlsFiles:
        """A certificate for what says to be ``machine``."""
        return self.identity(self._folder / uuid.uuid4().hex, role, machine).tls

    def _pair(
        self, name: str, unit: str, names: tuple[str, ...], lifetime: dt.timedelta = LIFETIME
    ) -> str:
        key = new_key()
        usages = [SERVER, CLIENT]
        holder = subject(name, unit)
        certificate = self._issuer.issue(
            holder, key.public_key(), usages=usages, lifetime=lifetime, names=names
        )
        path = self._folder / f"{serial_text(certificate.serial_number)}.pem"
        write_whole(str(path), key_pem(key) + certificate_pem(certificate))
        return str(path)

    async def _give_assignment(self, request: web.Request) -> web.Response:
        node, after = _node(request), int(request.query["after"])

        def newer() -> Message | None:
            found = self._assignments.get(node)
            return found if found is not None and getattr(found, "version", 0) != after else None

        try:
            async with asyncio.timeout(WAIT_SECONDS), self._changed:
                await self._changed.wait_for(lambda: newer() is not None)
        except TimeoutError:
            return web.Response(status=204)
        found = newer()
        assert found is not None
        return web.Response(body=found.model_dump_json().encode(), content_type="application/json")

    async def _take_report(self, request: web.Request) -> web.Response:
        node = _node(request)
        self.reports[node] = json.loads(await request.read())
        answer = ReportAnswer(time_ns=time.time_ns(), assignment=0)
        return web.Response(body=answer.model_dump_json().encode(), content_type="application/json")

    async def _take_points(self, request: web.Request) -> web.Response:
        if not self.takes_points:
            refusal = {"code": "limit", "message": "too many", "hint": "", "details": {}}
            return web.json_response(refusal, status=429)
        told = json.loads(await request.read())
        self.points[uuid.UUID(told["machine"])] = told
        self.lists += 1
        return web.Response(status=204)

    async def _take_evidence(self, request: web.Request) -> web.Response:
        _node(request)
        content = Evidence.model_validate_json(await request.read()).bytes()
        vm, kind = uuid.UUID(request.match_info["vm"]), EvidenceKind(request.match_info["kind"])
        self.evidence[vm, kind] = content
        return web.Response(status=204)

    async def _renew(self, request: web.Request) -> web.Response:
        node = _node(request)
        asked = SigningRequest.read(json.loads(await request.read())["csr_pem"])
        certificate = self._issuer.issue(
            subject(str(node), NodeRole.PROCESS_SERVER.value),
            asked.public_key,
            usages=[SERVER, CLIENT],
            lifetime=LIFETIME,
            names=("127.0.0.1",),
        )
        answer = Enrolled(
            node=node,
            certificate_pem=certificate_pem(certificate).decode(),
            ca_pem=certificate_pem(self._issuer.certificate).decode(),
        )
        return web.Response(body=answer.model_dump_json().encode(), content_type="application/json")

    async def _give_data_key(self, request: web.Request) -> web.Response:
        machine = uuid.UUID(request.match_info["machine"])
        self.asked.append((_node(request), machine))
        await asyncio.sleep(self.key_seconds)
        key = self.data_keys.get(machine)
        if key is None:
            refusal = {"code": "forbidden", "message": "not yours", "hint": "", "details": {}}
            return web.json_response(refusal, status=403)
        return web.json_response({"machine": str(machine), "data_key": key.hex()})


def _node(request: web.Request) -> uuid.UUID:
    assert request.transport is not None
    subject_parts = request.transport.get_extra_info("peercert")["subject"]
    return uuid.UUID(dict(pair for part in subject_parts for pair in part)["commonName"])

"""A config server and a process server for one machine's agent, over real TLS.

``ControlServer`` speaks the documents of docs/CONTROL.md §3 to §5. ``SecondSite`` takes changesets
as a process server does and applies them to images in memory, as an applier would.
"""

import asyncio
import contextlib
import datetime as dt
import secrets
import ssl
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from daemon.certificates import (
    CLIENT,
    SERVER,
    Issuer,
    SigningRequest,
    certificate_der,
    certificate_pem,
    key_pem,
    new_key,
    subject,
)
from daemon.tls import CONFIG_SERVER_UNIT
from replication.bookmark import NOTHING, Stamp
from replication.control.assignment import AssignedDisk, MachineAssignment
from replication.control.data_key import GivenDataKey
from replication.control.enrolment import (
    NONCE_BYTES,
    SALT_BYTES,
    CertificateRequest,
    Challenge,
    ChallengeRequest,
    Enrolled,
    client_proof,
    derive_key,
    server_proof,
)
from replication.control.message import Message
from replication.control.report import MachineReport, ReportAnswer
from replication.envelope import AttemptKey
from replication.manifest import Manifest, open_manifest
from replication.stream import ATTEMPT_HEADER, Refusal, StreamState
from replication.watermark import NO_ATTEMPT, Repair, Watermark, WatermarkKey
from tests.agents.mobility.replica import BLOCK, opened_frames

DAY = dt.timedelta(days=1)
PASSPHRASE = "correct horse battery staple"


class Listener:
    """One TLS listener on a port that stays the same; can go away and come back."""

    def __init__(self, app: web.Application, context: ssl.SSLContext) -> None:
        self._app_runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        self._context = context
        self._site: web.TCPSite | None = None
        self.port = 0

    async def start(self) -> None:
        if not self.port:
            await self._app_runner.setup()
        self._site = web.TCPSite(
            self._app_runner, "127.0.0.1", self.port, ssl_context=self._context
        )
        await self._site.start()
        self.port = self._app_runner.addresses[0][1]

    async def go_away(self) -> None:
        """Refuse connections, and end those that there are."""
        assert self._site is not None
        await self._site.stop()
        server = self._app_runner.server
        assert server is not None
        for connection in list(server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    async def end(self) -> None:
        await self._app_runner.cleanup()

    @property
    def origin(self) -> str:
        return f"https://127.0.0.1:{self.port}"


class ControlServer:
    """Enrols one machine and tells it what to do; keeps what it reports."""

    def __init__(self, folder: Path) -> None:
        self._issuer = Issuer.create("a test's CA", DAY)
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._nonces: dict[uuid.UUID, tuple[bytes, bytes]] = {}
        self._changed = asyncio.Event()
        self.data_key = secrets.token_bytes(32)
        self.keys_given = 0
        self.enrolled: CertificateRequest | None = None
        self.assignment: MachineAssignment | None = None
        self.reports: list[MachineReport] = []
        app = web.Application()
        app.router.add_post("/api/v1/enrolment/challenges", self._challenge)
        app.router.add_post("/api/v1/enrolment/certificates", self._certificate)
        app.router.add_get("/api/v1/node/assignment", self._assignment)
        app.router.add_post("/api/v1/node/reports", self._report)
        app.router.add_get("/api/v1/node/data-keys/{machine}", self._data_key)
        self.listener = Listener(app, self.context(folder))

    def context(self, folder: Path, unit: str = CONFIG_SERVER_UNIT) -> ssl.SSLContext:
        """For a listener with a certificate of the config server, or another ``unit``."""
        key = new_key()
        holder = subject(unit, unit)
        own = self._issuer.issue(
            holder, key.public_key(), usages=[SERVER], lifetime=DAY, names=["127.0.0.1"]
        )
        pair, ca = folder / f"{uuid.uuid4()}.pem", folder / "test-ca.pem"
        pair.write_bytes(key_pem(key) + certificate_pem(own))
        ca.write_bytes(certificate_pem(self._issuer.certificate))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair)
        context.load_verify_locations(ca)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context

    @property
    def machine(self) -> uuid.UUID:
        assert self.enrolled is not None
        return self.enrolled.node

    def assign(self, **changes: Any) -> None:
        """Tell the machine another thing to do; what is not named stays as it was."""
        before = self.assignment or MachineAssignment(
            version=0, machine=self.machine, name="db", protected=False
        )
        self.assignment = before.model_copy(update={"version": before.version + 1, **changes})
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _challenge(self, request: web.Request) -> web.Response:
        asked = ChallengeRequest.model_validate_json(await request.read())
        challenge, server_nonce = uuid.uuid4(), secrets.token_bytes(NONCE_BYTES)
        client_nonce = bytes.fromhex(asked.client_nonce)
        self._nonces[challenge] = (client_nonce, server_nonce)
        key = derive_key(PASSPHRASE, self._salt)
        ca_der = certificate_der(self._issuer.certificate)
        return _answer(
            Challenge(
                challenge=challenge,
                server_nonce=server_nonce.hex(),
                salt=self._salt.hex(),
                ca_pem=certificate_pem(self._issuer.certificate).decode(),
                proof=server_proof(key, client_nonce, server_nonce, ca_der, asked.role).hex(),
            )
        )

    async def _certificate(self, request: web.Request) -> web.Response:
        asked = CertificateRequest.model_validate_json(await request.read())
        csr = SigningRequest.read(asked.csr_pem)
        key = derive_key(PASSPHRASE, self._salt)
        proof = client_proof(key, *self._nonces.pop(asked.challenge), csr.der, asked)
        assert proof.hex() == asked.proof
        self.enrolled = asked
        holder = subject(str(asked.node), asked.role.value)
        certificate = self._issuer.issue(holder, csr.public_key, usages=[CLIENT], lifetime=DAY)
        return _answer(
            Enrolled(
                node=asked.node,
                certificate_pem=certificate_pem(certificate).decode(),
                ca_pem=certificate_pem(self._issuer.certificate).decode(),
            )
        )

    async def _assignment(self, request: web.Request) -> web.Response:
        assert request.transport
        assert request.transport.get_extra_info("peercert")
        after, seconds = int(request.query["after"]), float(request.query["wait_seconds"])
        changed = self._changed
        if self.assignment is None or self.assignment.version <= after:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), seconds)
        if self.assignment is None or self.assignment.version <= after:
            return web.Response(status=204)
        return _answer(self.assignment)

    async def _report(self, request: web.Request) -> web.Response:
        self.reports.append(MachineReport.model_validate_json(await request.read()))
        version = self.assignment.version if self.assignment else 0
        return _answer(ReportAnswer(time_ns=time.time_ns(), assignment=version))

    async def _data_key(self, request: web.Request) -> web.Response:
        assert request.match_info["machine"] == str(self.machine)
        self.keys_given += 1
        return _answer(GivenDataKey(machine=self.machine, data_key=self.data_key.hex()))


class SecondSite:
    """Takes a machine's changesets and applies them; ``images`` are its disks.

    repair: what its applier asks for; none: there is no applier that tells of anything.
    """

    def __init__(self, data_key: Callable[[], bytes], context: ssl.SSLContext) -> None:
        self._data_key = data_key
        self._segments: dict[tuple[Stamp, str, int], bytes] = {}
        self._committed, self._attempt = NOTHING, NO_ATTEMPT
        self.manifests: list[Manifest] = []
        self.images: dict[int, bytearray] = {}
        self._refuses: Callable[[], bool] = lambda: False
        self.repair: Repair | None = None
        app = web.Application(client_max_size=64 << 20)
        base = "/v1/machines/{machine}"
        app.router.add_get(f"{base}/state", self._state)
        number = f"{base}/generations/{{generation}}/changesets/{{number}}"
        app.router.add_put(f"{number}/segments/{{segment}}", self._put)
        app.router.add_post(f"{number}/commit", self._commit)
        app.router.add_get(f"{base}/generations/{{generation}}/sums/{{rest:.*}}", self._sums)
        self.listener = Listener(app, context)

    def refuse_commits(self, when: Callable[[], bool]) -> None:
        """As if it were away whenever a changeset is to be committed then."""
        self._refuses = when

    async def _state(self, request: web.Request) -> web.Response:
        machine = uuid.UUID(request.match_info["machine"])
        newest = max((m.bookmark.time_ns for m in self.manifests), default=0)
        watermark = Watermark(machine)
        if self.repair is not None:
            told = Watermark(machine, self._committed, self._attempt, newest, repair=self.repair)
            watermark = told.signed(WatermarkKey(self._data_key(), machine))
        state = StreamState(self._committed, self._attempt, newest, time.time_ns(), watermark)
        return web.Response(body=state.to_bytes())

    async def _put(self, request: web.Request) -> web.Response:
        place = (_stamp(request), request.headers[ATTEMPT_HEADER])
        self._segments[*place, int(request.match_info["segment"])] = await request.read()
        return web.Response(status=201)

    async def _commit(self, request: web.Request) -> web.Response:
        if self._refuses():
            return web.Response(status=503, body=Refusal("unavailable", "away").to_bytes())
        manifest, key = open_manifest(await request.read(), self._data_key())
        self._apply(manifest, key)
        self._segments.clear()
        self._committed, self._attempt = manifest.stamp, manifest.attempt
        self.manifests.append(manifest)
        return await self._state(request)

    async def _sums(self, _: web.Request) -> web.Response:
        return web.Response(status=404, body=Refusal("absent", "there are none").to_bytes())

    def _apply(self, manifest: Manifest, key: AttemptKey) -> None:
        sizes = {disk.index: -(-disk.size_bytes // BLOCK) * BLOCK for disk in manifest.disks}
        self.images = {
            index: self.images.get(index, bytearray(size)).ljust(size, b"\0")
            for index, size in sizes.items()
        }
        for number, _ in enumerate(manifest.segments):
            segment = self._segments[manifest.stamp, manifest.attempt.hex(), number]
            for frame, data in opened_frames(key, segment):
                offset = 0
                for extent in frame.header.extents:
                    start, size = extent.block * BLOCK, extent.count * BLOCK
                    piece = bytes(size) if extent.zero else data[offset : offset + size]
                    self.images[frame.header.disk][start : start + size] = piece
                    offset += extent.data_bytes


def disk(index: int, device: str | Path, size_bytes: int = 0) -> AssignedDisk:
    return AssignedDisk(index=index, device=str(device), name=f"disk{index}", size_bytes=size_bytes)


def _answer(message: Message) -> web.Response:
    return web.Response(body=message.model_dump_json().encode(), content_type="application/json")


def _stamp(request: web.Request) -> Stamp:
    return Stamp(int(request.match_info["generation"]), int(request.match_info["number"]))

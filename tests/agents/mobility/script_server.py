"""A process server that does as it is told: real TLS, answers from a script."""

import asyncio
import contextlib
import datetime as dt
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import xxhash
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from daemon.tls import TlsFiles, server_context
from replication.stream import DIGEST_HEADER, Refusal

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Authority:
    """A private CA; certificates for ``localhost`` and for clients."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        own = self._sign(name, self._key.public_key(), is_ca=True)
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(own.public_bytes(Encoding.PEM))

    def issue(self, name: str) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        base = self._folder / f"{self._name}-{name}"
        certificate = self._sign(name, key.public_key(), is_ca=False)
        base.with_suffix(".crt").write_bytes(certificate.public_bytes(Encoding.PEM))
        base.with_suffix(".key").write_bytes(
            key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        base.with_suffix(".key").chmod(0o600)
        return TlsFiles(
            certificate=str(base.with_suffix(".crt")),
            key=str(base.with_suffix(".key")),
            ca=str(self.path),
        )

    def _sign(self, name: str, key: ec.EllipticCurvePublicKey, *, is_ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=is_ca, crl_sign=is_ca, content_commitment=False,
            key_encipherment=False, data_encipherment=False, key_agreement=False,
            encipher_only=False, decipher_only=False,
        )  # fmt: skip
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self._name)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(minutes=1))
            .not_valid_after(now + dt.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(is_ca, None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )


class ScriptServer:
    """Answers requests by ``script`` in turn, and by ``store`` when it is at its end."""

    def __init__(self) -> None:
        self.script: list[Answer] = []
        self.always: Answer | None = None
        self.stored: dict[str, bytes] = {}
        self.state = b"{}"
        self.paths: list[str] = []
        self.arrived = asyncio.Event()
        self.origin = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.paths.append(request.path)
        self.arrived.set()
        if self.script:
            return await self.script.pop(0)(request)
        if self.always:
            return await self.always(request)
        return await self.store(request)

    async def store(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.method == "PUT":
            assert xxhash.xxh3_128_hexdigest(body) == request.headers[DIGEST_HEADER]
            self.stored[request.path] = body
            return web.Response(status=201)
        if request.method == "POST":
            self.stored[request.path] = body
        return web.Response(body=self.state)


def refuse(status: int, *, retry_after: str = "", read: bool = True, text: str = "no") -> Answer:
    async def answer(request: web.Request) -> web.StreamResponse:
        if read:
            await request.read()
        headers = {"Retry-After": retry_after} if retry_after else {}
        body = Refusal("code", text, "do this").to_bytes()
        return web.Response(status=status, body=body, headers=headers)

    return answer


async def hang_up(request: web.Request) -> web.StreamResponse:
    """The connection breaks in the middle of the body."""
    await request.content.read(1000)
    assert request.transport
    request.transport.abort()
    raise ConnectionResetError


async def never_read(request: web.Request) -> web.StreamResponse:
    """The process server hangs: it neither reads on nor answers."""
    await asyncio.sleep(60)
    raise AssertionError


@contextlib.asynccontextmanager
async def running(tls: TlsFiles) -> AsyncIterator[ScriptServer]:
    server = ScriptServer()
    app = web.Application(client_max_size=64 << 20)
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "localhost", 0, ssl_context=server_context(tls))
    try:
        await site.start()
        server.origin = f"https://localhost:{runner.addresses[0][1]}"
        yield server
    finally:
        await runner.cleanup()

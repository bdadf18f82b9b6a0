"""A real process server in its own process, and a client with real certificates."""

import asyncio
import inspect
import signal
import ssl
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import aiohttp
import xxhash

from appliance.cli.authority import Authority
from daemon.tls import TlsFiles, client_context
from replication.stream import (
    ATTEMPT_HEADER,
    DIGEST_HEADER,
    Refusal,
    StreamState,
    commit_path,
    segment_path,
    state_path,
)
from tests.appliance.process_server.sample import SampleChangeset
from tests.azure_emu.fixtures import free_ports
from tests.preloaded import Forked, start_daemon

START_SECONDS_MAX = 120.0


async def become(
    holds: Callable[[], object] | Callable[[], Awaitable[object]], *, seconds_max: float = 30.0
) -> None:
    """Wait until ``holds`` does; TimeoutError when it never does."""
    async with asyncio.timeout(seconds_max):
        while True:
            found = holds()
            if await found if inspect.isawaitable(found) else found:
                return
            await asyncio.sleep(0.05)


class Certificates:
    """A CA in a folder, which issues what a test asks for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        Authority.create(str(folder / "ca"))
        self._authority = Authority.open(str(folder / "ca"))

    def of_server(self) -> TlsFiles:
        folder = self._folder / "server"
        if not folder.exists():
            self._authority.issue_server(["127.0.0.1"], str(folder))
        return tls_files(folder)

    def of_machine(self, machine: uuid.UUID) -> TlsFiles:
        folder = self._folder / str(machine)
        if not folder.exists():
            self._authority.issue_machine(machine, str(folder))
        return tls_files(folder)


def tls_files(folder: Path) -> TlsFiles:
    names = ("certificate.pem", "key.pem", "ca.pem")
    certificate, key, ca = (str(folder / name) for name in names)
    return TlsFiles(certificate=certificate, key=key, ca=ca)


class ProcessServer:
    """``python -m appliance.process_server`` with its spool in ``folder``."""

    def __init__(
        self,
        folder: Path,
        certificates: Certificates,
        connection_string: str,
        *,
        spool: Path | None = None,
        spool_bytes_max: int = 1 << 30,
        limits: str = "",
        cache: str = "",
        head: str = "",
        authority: str = "",
    ) -> None:
        """``authority``: a section in the place of ``[tls]``."""
        self.certificates = certificates
        self.spool = spool or folder / "spool"
        self.port, self.health_port = free_ports(2)
        self.log = folder / "process_server.log"
        self._config = folder / "process_server.toml"
        self._process: Forked | None = None
        tls = certificates.of_server()
        by_hand = f"""[tls]
certificate = "{tls.certificate}"
key = "{tls.key}"
ca = "{tls.ca}"
"""
        self._config.write_text(
            f"""{head}
[listen]
host = "127.0.0.1"
port = {self.port}
names = ["127.0.0.1"]
{authority or by_hand}
[spool]
folder = "{self.spool}"
bytes_max = {spool_bytes_max}
[cache]
connection_string = "{connection_string}"
watermark_seconds = 0.2
watermark_idle_seconds = 0.2
recheck_seconds = 1.0
{cache}
[limits]
{limits}
[service]
health_port = {self.health_port}
"""
        )
        self._config.chmod(0o600)

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> Self:
        """Start, and return when agents are answered."""
        assert self._process is None, "started already"
        with self.log.open("wb") as log:
            self._process = start_daemon(
                "appliance.process_server", "--config", str(self._config), log_fd=log.fileno()
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while b"agents on port" not in self.log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the process server did not start: {self.log.read_text()}")
            time.sleep(0.02)
        return self

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        process, self._process = self._process, None
        assert process is not None, "not started"
        try:
            process.send_signal(signal.SIGTERM)
            return process.wait(15)
        finally:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """SIGKILL."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    async def health(self) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.health_port}/healthz"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            found: dict[str, Any] = await response.json()
            return found

    async def metrics(self) -> dict[str, float]:
        url = f"http://127.0.0.1:{self.health_port}/metrics"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            lines = (await response.text()).splitlines()
        told = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in told}

    def spooled(self, machine: uuid.UUID) -> list[str]:
        """The files of a machine's attempts."""
        folder = self.spool / str(machine)
        return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*/*/*"))


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered."""

    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def state(self) -> StreamState:
        return StreamState.from_bytes(self.body)

    @property
    def refusal(self) -> Refusal:
        return Refusal.from_bytes(self.body)

    @property
    def told(self) -> tuple[int, str]:
        """Status and code of a refusal."""
        return self.status, self.refusal.code


class Agent:
    """A machine's client; an async context."""

    def __init__(
        self, server: ProcessServer, machine: uuid.UUID, tls: TlsFiles | None = None
    ) -> None:
        self.server = server
        self.machine = machine
        self.tls = tls or server.certificates.of_machine(machine)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            f"https://127.0.0.1:{self.server.port}",
            connector=aiohttp.TCPConnector(ssl=client_context(self.tls), limit=8),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(
        self, method: str, path: str, data: object = None, headers: dict[str, str] | None = None
    ) -> Reply:
        async with self._session.request(
            method, path, data=data, headers=headers, skip_auto_headers=["Content-Type"]
        ) as response:
            return Reply(response.status, await response.read(), dict(response.headers))

    async def state(self) -> Reply:
        return await self.ask("GET", state_path(self.machine))

    async def put(self, changeset: SampleChangeset, index: int, **changed: bytes) -> Reply:
        """Put a segment; ``body``, ``digest`` and ``attempt`` may be others than its own."""
        body = changed.get("body", changeset.segments[index])
        digest = changed.get("digest", xxhash.xxh3_128_digest(body))
        attempt = changed.get("attempt", changeset.attempt)
        headers = {ATTEMPT_HEADER: attempt.hex(), DIGEST_HEADER: digest.hex()}
        path = segment_path(self.machine, changeset.stamp, index)
        return await self.ask("PUT", path, body, headers)

    async def put_all(self, changeset: SampleChangeset) -> None:
        for index in range(len(changeset.segments)):
            reply = await self.put(changeset, index)
            assert reply.status in (200, 201), reply

    async def commit(self, changeset: SampleChangeset, content: bytes | None = None) -> Reply:
        path = commit_path(self.machine, changeset.stamp)
        return await self.ask("POST", path, changeset.content if content is None else content)

    async def send(self, changeset: SampleChangeset) -> Reply:
        """All segments and the commit."""
        await self.put_all(changeset)
        reply = await self.commit(changeset)
        assert reply.status in (200, 201), reply
        return reply

    async def exchange(self, sent: bytes, *, wait_seconds: float = 20.0) -> bytes:
        """Raw bytes over TLS; everything that comes back until the server closes."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.server.port, ssl=client_context(self.tls), server_hostname="127.0.0.1"
        )
        try:
            writer.write(sent)
            async with asyncio.timeout(wait_seconds):
                return await reader.read()
        finally:
            writer.close()


TLS_ERRORS = (aiohttp.ClientError, ssl.SSLError, ConnectionError)

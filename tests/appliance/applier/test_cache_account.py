"""One suite over both kinds of cache storage account: real Azurite, and a folder."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from azure.storage.queue.aio import QueueServiceClient

from appliance.applier.azure_account import AzureAccount
from appliance.applier.cache_account import API_VERSION_DEFAULT, CacheAccount
from appliance.applier.folder_account import FolderAccount
from replication.cache_layout import WAKE_QUEUE, lease_name
from replication.errors import ConfigError, UnavailableError
from tests.azure_emu.fixtures import EmulatorProcess, free_ports

Opener = Callable[[], CacheAccount]


@pytest.fixture(params=["azurite", "folder"])
async def open_account(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    opened: list[CacheAccount] = []

    def opener() -> CacheAccount:
        if request.param == "folder":
            (tmp_path / "cache").mkdir(exist_ok=True)
            account: CacheAccount = FolderAccount(str(tmp_path / "cache"))
        else:
            emulator: EmulatorProcess = request.getfixturevalue("azurite")
            account = AzureAccount(emulator.connection_string)
        opened.append(account)
        return account

    yield opener
    for account in opened:
        await account.close()


def a_container() -> str:
    return f"{uuid.uuid4().hex}-g00000001-000000000000"


async def test_written_blob_is_listed_and_read_whole(open_account: Opener) -> None:
    account, container = open_account(), a_container()
    await account.write(container, "manifest/000000000001", b"m" * 1000)
    await account.write(container, "segment/000000000001/aa/000000", b"s")
    blobs = await account.blobs(container, "manifest/")
    assert [(blob.name, blob.size_bytes) for blob in blobs] == [("manifest/000000000001", 1000)]
    assert await account.read(container, "manifest/000000000001", 1000) == b"m" * 1000
    assert container in await account.containers(container[:32])
    assert await account.containers("f" * 40) == []


async def test_empty_blob_is_read_as_empty(open_account: Opener) -> None:
    account, container = open_account(), a_container()
    await account.write(container, "segment/x", b"")
    assert await account.read(container, "segment/x", 100) == b""


async def test_blob_that_is_too_long_shows_it_without_being_read_whole(
    open_account: Opener,
) -> None:
    account, container = open_account(), a_container()
    await account.write(container, "segment/x", bytes(3 << 20))
    assert len(await account.read(container, "segment/x", 1 << 20) or b"") == (1 << 20) + 1


async def test_blob_put_again_has_another_version(open_account: Opener) -> None:
    account, container = open_account(), a_container()
    await account.write(container, "segment/x", b"same")
    (before,) = await account.blobs(container, "segment/")
    await account.write(container, "segment/x", b"same")
    (after,) = await account.blobs(container, "segment/")
    assert before.version != after.version


async def test_missing_blob_and_missing_container_are_none(open_account: Opener) -> None:
    account, container = open_account(), a_container()
    assert await account.read(container, "manifest/000000000001", 10) is None
    assert await account.blobs(container, "manifest/") == []
    await account.write(container, "a/b", b"1")
    assert await account.read(container, "a/c", 10) is None


async def test_dropped_container_is_gone_and_dropping_twice_is_fine(open_account: Opener) -> None:
    account, container = open_account(), a_container()
    await account.write(container, "a/b", b"1")
    await account.drop(container)
    await account.drop(container)
    assert await account.read(container, "a/b", 10) is None
    assert container not in await account.containers(container)


async def test_lease_is_held_by_one_owner_and_held_again_by_the_same(open_account: Opener) -> None:
    name = lease_name(uuid.uuid4())
    first, second = open_account(), open_account()
    one, other = uuid.uuid4(), uuid.uuid4()
    assert await first.hold(name, one)
    assert await first.hold(name, one)
    assert not await second.hold(name, other)
    await second.release(name, other)
    assert not await second.hold(name, other)
    await first.release(name, one)
    assert await second.hold(name, other)
    assert not await first.hold(name, one)


async def test_of_many_that_want_a_new_lease_one_gets_it(open_account: Opener) -> None:
    name = lease_name(uuid.uuid4())
    accounts = [open_account() for _ in range(6)]
    held = await asyncio.gather(*(account.hold(name, uuid.uuid4()) for account in accounts))
    assert sum(held) == 1


async def test_messages_that_are_mine_are_used_up(azurite: EmulatorProcess) -> None:
    mine, foreign = str(uuid.uuid4()), str(uuid.uuid4())
    account = AzureAccount(azurite.connection_string)
    async with (
        contextlib.aclosing(_Closing(account)),
        QueueServiceClient.from_connection_string(
            azurite.connection_string, api_version=API_VERSION_DEFAULT
        ) as service,
    ):
        assert await account.wakes({mine}) == set()  # no queue yet
        queue = service.get_queue_client(WAKE_QUEUE)
        await queue.create_queue()
        for text in (mine, foreign, mine, "no machine's id"):
            await queue.send_message(text)
        assert await account.wakes({mine}) == {mine, foreign, "no machine's id"}
        assert await account.wakes({mine}) == set()  # what is left is hidden for a while
        assert (await queue.get_queue_properties()).approximate_message_count == 2
        await queue.delete_queue()


async def test_account_that_does_not_answer_is_unavailable_soon() -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/nobody"
    account = AzureAccount(
        f"DefaultEndpointsProtocol=http;AccountName=nobody;AccountKey=AAAA;BlobEndpoint={url};"
        f"QueueEndpoint={url};"
    )
    async with contextlib.aclosing(_Closing(account)):
        with pytest.raises(UnavailableError, match="does not answer"):
            await asyncio.wait_for(account.containers("x"), 30)


def test_nonsense_is_no_connection_string() -> None:
    with pytest.raises(ConfigError, match="connection_string"):
        AzureAccount("AccountName")


async def test_folder_that_is_not_mounted_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not there"):
        await FolderAccount(str(tmp_path / "absent")).containers("")


class _Closing:
    def __init__(self, account: AzureAccount) -> None:
        self._account = account

    async def aclose(self) -> None:
        await self._account.close()

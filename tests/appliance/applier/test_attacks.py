"""What whoever may write into the cache storage account, or owns a machine, can do and cannot."""

import gzip
from pathlib import Path

import pytest
from azure.storage.blob import ContentSettings
from azure.storage.blob.aio import BlobServiceClient

from appliance.applier.azure_account import AzureAccount
from appliance.applier.cache_account import API_VERSION_DEFAULT
from appliance.applier.inbox import CONTAINERS_LISTED_MAX
from appliance.applier.repair_book import RepairBook
from replication.bookmark import Stamp
from replication.cache_layout import container_name, manifest_name
from replication.document import UINT_MAX
from replication.watermark import RepairRun
from tests.appliance.applier.running import Site, until
from tests.appliance.applier.source import Source, a_source
from tests.azure_emu.fixtures import EmulatorProcess


def a_small_source() -> Source:
    return a_source(256 << 10)


async def test_packed_blob_is_read_as_it_lies_there(azurite: EmulatorProcess) -> None:
    """Else 32 MiB in the cache would be 32 GiB in memory."""
    name = manifest_name(1)
    container = container_name(a_small_source().machine, Stamp(1, 1))
    packed = gzip.compress(bytes(8 << 20), 9)
    account = AzureAccount(azurite.connection_string)
    async with BlobServiceClient.from_connection_string(
        azurite.connection_string, api_version=API_VERSION_DEFAULT
    ) as blobs:
        client = await blobs.create_container(container)
        settings = ContentSettings(content_encoding="gzip")
        await client.upload_blob(name, packed, content_settings=settings)
        try:
            assert await account.read(container, name, len(packed)) == packed
        finally:
            await account.close()


async def test_container_that_cannot_be_dropped_stops_nothing(
    azure_site: Site, azurite: EmulatorProcess
) -> None:
    source = a_small_source()
    source.number = 62
    changesets = [source.changeset(since=0)]
    await changesets[0].put(azure_site.account)
    async with BlobServiceClient.from_connection_string(
        azurite.connection_string, api_version=API_VERSION_DEFAULT
    ) as blobs:
        client = blobs.get_container_client(changesets[0].container)
        lease = await client.acquire_lease(-1)
        try:
            async with azure_site.applier(source) as service:
                await azure_site.until_applied(source, Stamp(1, 63))
                for _ in range(3):
                    source.scribble()
                    changesets.append(source.changeset())
                    await changesets[-1].put(azure_site.account)
                await azure_site.until_applied(source, Stamp(1, 66))
                await until(lambda: "refuses to drop" in str(service.health.warnings))
                assert not service.health.criticals
        finally:
            await lease.release()
    azure_site.check(source, *changesets)


async def test_manifest_in_a_container_of_other_numbers_is_passed_over(site: Site) -> None:
    source = a_small_source()
    first = source.changeset()
    source.scribble()
    second = source.changeset()
    elsewhere = container_name(source.machine, Stamp(1, 640))
    await site.account.write(elsewhere, first.manifest_name, first.sealed)
    await site.account.write(elsewhere, second.manifest_name, b"junk")
    for changeset in (first, second):
        await changeset.put(site.account)
    async with site.applier(source):
        watermark = await site.until_applied(source, Stamp(1, 2))
        assert watermark.wanted == ()
    site.check(source, first, second)
    assert site.events(source) == ""


async def test_containers_of_later_generations_do_not_hide_this_one(site: Site) -> None:
    source = a_small_source()
    first = source.changeset()
    await first.put(site.account)
    async with site.applier(source) as service:
        await site.until_applied(source, Stamp(1, 1))
        root = Path(site.cache["folder"])
        for generation in range(1000, 1000 + CONTAINERS_LISTED_MAX):
            (root / container_name(source.machine, Stamp(generation, 1))).mkdir()
        source.scribble()
        second = source.changeset()
        await second.put(site.account)
        await site.until_applied(source, Stamp(1, 2))
        await until(lambda: "containers more wait" in str(service.health.warnings))
    site.check(source, first, second)


async def test_junk_of_a_later_generation_does_not_keep_the_agent_from_a_new_one(
    site: Site,
) -> None:
    """The agent begins a new generation only if its own is the one that is called lost."""
    source = a_small_source()
    first = source.changeset()
    await first.put(site.account)
    for generation in (7, (1 << 32) - 1, 9_999_999_999):
        junk = container_name(source.machine, Stamp(generation, 1))
        await site.account.write(junk, manifest_name(1), b"junk")
    async with site.applier(source, gap_seconds_max=0.3):
        watermark = await site.until(source, lambda found: bool(found.lost))
        assert (watermark.applied, watermark.lost_generation) == (Stamp(1, 1), 1)


@pytest.mark.parametrize("claimed", [2, UINT_MAX])
def test_request_that_was_never_made_closes_no_repair(tmp_path: Path, claimed: int) -> None:
    """An agent may have been told of it by somebody else; its manifests say so from then on."""
    book = RepairBook(str(tmp_path))
    book.ask([RepairRun(0, 5, 1)])
    assert book.fulfilled(claimed) == ()
    assert book.fulfilled(1) == (RepairRun(0, 5, 1),)

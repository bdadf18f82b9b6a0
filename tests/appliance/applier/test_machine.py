"""Changesets through a cache into recovery points, and all that can be wrong with them."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.applier.azure_account import AzureAccount
from appliance.applier.folder_account import FolderAccount
from replication.bookmark import Stamp
from tests.appliance.applier.running import Site
from tests.appliance.applier.source import a_source
from tests.azure_emu.fixtures import EmulatorProcess


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    cache = tmp_path / "cache"
    cache.mkdir()
    account = FolderAccount(str(cache))
    yield Site(tmp_path, account, {"folder": str(cache)})
    await account.close()


@pytest.fixture
async def azure_site(tmp_path: Path, azurite: EmulatorProcess) -> AsyncIterator[Site]:
    account = AzureAccount(azurite.connection_string)
    yield Site(tmp_path, account, {"connection_string": azurite.connection_string})
    await account.close()


@pytest.fixture(params=["site", "azure_site"])
def any_site(request: pytest.FixtureRequest) -> Site:
    site: Site = request.getfixturevalue(request.param)
    return site


async def test_every_point_holds_what_the_source_had(any_site: Site) -> None:
    source = a_source()
    changesets = []
    async with any_site.applier(source):
        for _ in range(6):
            changesets.append(source.changeset())
            await changesets[-1].put(any_site.account)
            source.scribble()
        watermark = await any_site.until_applied(source, Stamp(1, 6))
    assert watermark.attempt == changesets[-1].manifest.attempt
    assert watermark.restorable_ns == changesets[-1].manifest.bookmark.time_ns
    assert (watermark.wanted, watermark.repair.request, watermark.lost) == ((), 0, "")
    any_site.check(source, *changesets)
    assert any_site.events(source) == ""

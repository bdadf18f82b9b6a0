from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from appliance.applier.azure_account import AzureAccount
from appliance.applier.folder_account import FolderAccount
from tests.appliance.applier.running import Site
from tests.azure_emu.fixtures import EmulatorProcess, azurite

__all__ = ["azurite"]


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

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from appliance.applier.azure_account import AzureAccount
from appliance.applier.folder_account import FolderAccount
from replication.control.role import NodeRole
from tests.appliance.applier.controlled import NODE
from tests.appliance.applier.running import ApplierProcess, Site
from tests.appliance.orders import Orders
from tests.azure_emu.fixtures import EmulatorProcess, azurite, free_ports

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


@pytest.fixture
async def orders(tmp_path: Path) -> AsyncIterator[Orders]:
    async with Orders(tmp_path / "orders", free_ports(1)[0]) as orders:
        orders.identity(tmp_path / "identity", NodeRole.APPLIER, NODE)
        yield orders


@pytest.fixture
def health_port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def spawn(site: Site, orders: Orders, health_port: int) -> Callable[[], ApplierProcess]:
    path = site.folder / "controlled.toml"
    path.write_text(
        f"""store = "{site.store}"
sweep_seconds = 0.05
points_seconds = 0.2
points_mount = "{site.folder / "points"}"
[cache]
folder = "{site.cache["folder"]}"
[control]
config_server = "{orders.url}"
identity_folder = "{site.folder / "identity"}"
report_seconds = 0.2
wait_seconds = 2.0
[service]
health_port = {health_port}
"""
    )

    def start() -> ApplierProcess:
        return ApplierProcess(path, site.folder / "applier.log")

    return start

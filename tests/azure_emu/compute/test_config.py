from pathlib import Path

import pytest

from azure_emu.compute.config import ComputeConfig
from azure_emu.compute.guest.build import default_folder
from replication.errors import ConfigError


def written(folder: Path, extra: str = "") -> str:
    path = folder / "compute.toml"
    path.write_text(f'points_folder = "/points"\ndata_folder = "/data/"\n{extra}\n')
    return str(path)


def test_what_is_not_said_is_sensible(tmp_path: Path) -> None:
    config = ComputeConfig.load(written(tmp_path), {})
    assert config.data_folder == "/data"
    assert config.guest_folder == default_folder()
    assert config.accelerator == "auto"
    assert config.memory_max() > 64 << 20
    assert config.network.addresses.num_addresses == 65536


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("data = 1", "data: unknown key"),
        ('guest_folder = "guest"', "guest_folder: an absolute path"),
        ('accelerator = "fast"', "accelerator"),
        ("boots_max = 0", "boots_max"),
        ('[network]\npool = "10.0.0.1/24"', "network: 10.0.0.1/24 has host bits"),
        ('[network]\npool = "10.0.0.0/24"\nprefix = 16', "does not fit"),
        ('[network]\nnamespaces = "a/b"', "network.namespaces"),
        ('[network]\nuplink = "../x"', "network.uplink"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, extra: str, told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ComputeConfig.load(written(tmp_path, extra), {})
    assert told in str(raised.value)


def test_memory_that_is_said_is_taken(tmp_path: Path) -> None:
    config = ComputeConfig.load(written(tmp_path, "memory_bytes_max = 7"), {})
    assert config.memory_max() == 7

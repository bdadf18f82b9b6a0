from pathlib import Path

import pytest

from appliance.applier.config import ApplierConfig, read_secret
from appliance.applier.folder_account import FolderAccount
from replication.errors import ConfigError

MACHINE = "8c2f6e0e-6ac5-4b60-b5a9-4cbba0b0b6b1"
GOOD = f"""
store = "/var/lib/understudy"
[cache]
folder = "/srv/cache"
[retention]
retention_days = 3
[[machines]]
id = "{MACHINE}"
name = "web"
data_key_file = "/etc/understudy/web.key"
"""


def load(folder: Path, text: str, **environ: str) -> ApplierConfig:
    path = folder / "applier.toml"
    path.write_text(text)
    return ApplierConfig.load(str(path), environ)


def test_defaults_are_those_of_the_documentation(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert isinstance(config.cache.open(), FolderAccount)
    assert config.retention.crash_frequency_seconds == 300
    assert config.retention.all_points_seconds == 7200
    assert config.sweep_seconds == 5
    assert config.gap_seconds_max == 900
    assert config.fetch_bytes_max == 32 << 20


def test_environment_overrides(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD, UNDERSTUDY_SCRUB_BYTES_PER_SECOND="0")
    assert config.scrub_bytes_per_second == 0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('folder = "/srv/cache"', "", "give one of"),
        ('folder = "/srv/cache"', 'folder = "/a"\nconnection_string = "b"', "give one of"),
        ("retention_days", "retention_dayz", "unknown key"),
        (MACHINE, "web", "machines.0.id"),
        ('store = "/var/lib/understudy"', "", "store"),
        ("[cache]", "fetch_bytes_max = 1048576\n[cache]", "fetch_bytes_max"),
        (
            'name = "web"',
            'name = "web"\n'
            + GOOD[GOOD.index("data_key") :].strip()
            + '\n[[machines]]\nid = "'
            + MACHINE
            + '"\nname = "db"',
            "twice",
        ),
    ],
)
def test_misconfiguration_names_the_key(tmp_path: Path, old: str, new: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, GOOD.replace(old, new))


def test_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("x")
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="mode 0604"):
        read_secret(str(path), "key")
    path.chmod(0o600)
    assert read_secret(str(path), "key") == "x"

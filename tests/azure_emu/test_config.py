from pathlib import Path

import pytest

from azure_emu.config import Account, Config
from replication.errors import ConfigError

KEY = "A" * 86 + "=="


def written(folder: Path, account: str, extra: str = "") -> str:
    path = folder / "emulator.toml"
    path.write_text(f'[storage]\ndata_folder = "{folder}"\naccount = {account}\n{extra}\n')
    path.chmod(0o600)
    return str(path)


def test_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = written(tmp_path, f'{{ name = "cache", key = "{KEY}" }}', "blob_prot = 1")
    with pytest.raises(ConfigError, match=r"storage\.blob_prot: unknown key"):
        Config.load(path, {})


def test_environment_overrides_a_port(tmp_path: Path) -> None:
    path = written(tmp_path, f'{{ name = "cache", key = "{KEY}" }}')
    config = Config.load(path, {"UNDERSTUDY_STORAGE__BLOB_PORT": "4711"})
    assert config.storage.blob_port == 4711


@pytest.mark.parametrize(
    ("account", "message"),
    [
        ('{ name = "Cache!", key = "x" }', "storage.account.name"),
        ('{ name = "cache" }', "either key or key_file"),
        ('{ name = "cache", key = "x", key_file = "y" }', "either key or key_file"),
    ],
)
def test_unusable_account_is_refused(tmp_path: Path, account: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.load(written(tmp_path, account), {})


def test_same_port_twice_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, f'{{ name = "cache", key = "{KEY}" }}', "blob_port = 10001")
    with pytest.raises(ConfigError, match="both 10001"):
        Config.load(path, {})


@pytest.mark.parametrize(("key", "message"), [("not base64!", "not base64"), ("QUFB", "3 bytes")])
def test_malformed_key_never_reaches_azurite(key: str, message: str) -> None:
    account = Account.model_validate({"name": "cache", "key": key})
    with pytest.raises(ConfigError, match=message) as raised:
        account.read_key()
    assert key not in str(raised.value)
    assert key not in repr(account)


def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(KEY + "\n")
    account = Account(name="cache", key_file=str(path))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        account.read_key()
    path.chmod(0o600)
    assert account.read_key() == KEY


def test_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/none: No such file"):
        Account(name="cache", key_file=f"{tmp_path}/none").read_key()

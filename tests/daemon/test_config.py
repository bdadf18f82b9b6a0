from pathlib import Path

import pytest
from pydantic import SecretStr

from daemon.config import DaemonConfig, Section
from replication.errors import ConfigError


class Spool(Section):
    folder: str
    bytes_max: int = 10


class Config(DaemonConfig):
    spool: Spool
    rounds_max: int = 3


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "daemon.toml"
    path.write_text('[spool]\nfolder = "/there"\n')
    return path


def test_file_is_read_and_defaults_hold(path: Path) -> None:
    config = Config.load(str(path), {})
    assert (config.spool.folder, config.spool.bytes_max, config.rounds_max) == ("/there", 10, 3)


def test_environment_wins_over_the_file(path: Path) -> None:
    config = Config.load(
        str(path),
        {
            "UNDERSTUDY_SPOOL__FOLDER": "/else/where",
            "UNDERSTUDY_SPOOL__BYTES_MAX": "99",
            "UNDERSTUDY_ROUNDS_MAX": "7",
            "UNDERSTUDY_HOME": "another program's",
            "OTHER_ROUNDS_MAX": "8",
        },
    )
    assert (config.spool.folder, config.spool.bytes_max) == ("/else/where", 99)
    assert config.rounds_max == 7


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[spool]\nfolder = "/x"\nbytes_mx = 1\n', r"spool\.bytes_mx: unknown key"),
        ('rounds = 1\n[spool]\nfolder = "/x"\n', "rounds: unknown key"),
        ("[spool]\n", r"spool\.folder"),
        ('[spool]\nfolder = "/x"\nbytes_max = "many"\n', r"spool\.bytes_max"),
        ("[spool\n", "not TOML"),
        ("spool = 1\n", "spool"),
    ],
)
def test_what_is_wrong_is_told_by_its_key(path: Path, text: str, key: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=key) as caught:
        Config.load(str(path), {})
    assert str(path) in str(caught.value)


def test_misspelt_key_in_the_environment_is_refused(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spool\.foldr: unknown key"):
        Config.load(str(path), {"UNDERSTUDY_SPOOL__FOLDR": "/x"})
    with pytest.raises(ConfigError, match="not a section"):
        Config.load(str(path), {"UNDERSTUDY_SPOOL__FOLDER__DEEP": "/x"})


def test_missing_file_and_bytes_that_are_no_text_are_told(path: Path) -> None:
    with pytest.raises(ConfigError, match="--config"):
        Config.load(str(path) + ".gone", {})
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        Config.load(str(path), {})


def test_configuration_cannot_be_changed(path: Path) -> None:
    config = Config.load(str(path), {})
    with pytest.raises(ValueError, match="frozen"):
        config.rounds_max = 5


class Account(Section):
    name: str
    key: SecretStr | None = None


class WithSecrets(DaemonConfig):
    accounts: tuple[Account, ...] = ()
    token: SecretStr | None = None


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('token = "hidden"', "token"),
        ('[[accounts]]\nname = "a"\n[[accounts]]\nname = "b"\nkey = "hidden"', r"accounts\.key"),
    ],
)
def test_file_with_a_secret_that_everyone_can_read_is_refused(
    text: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text(text)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"holds the secret {key}") as told:
        WithSecrets.load(str(path), {})
    assert told.value.hint == f"chmod o= {path}"
    assert "hidden" not in str(told.value)
    path.chmod(0o640)
    WithSecrets.load(str(path), {})


def test_file_without_the_secret_may_be_read_by_everyone(tmp_path: Path) -> None:
    path = tmp_path / "daemon.toml"
    path.write_text('[[accounts]]\nname = "a"\n')
    path.chmod(0o644)
    config = WithSecrets.load(str(path), {"UNDERSTUDY_TOKEN": "hidden"})
    assert config.token == SecretStr("hidden")

from pathlib import Path

import pytest

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

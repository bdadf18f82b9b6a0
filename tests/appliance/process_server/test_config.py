from pathlib import Path

import pytest

from appliance.process_server.config import PORT_DEFAULT, Config
from replication.errors import ConfigError

WHOLE = """
[tls]
certificate = "c"
key = "k"
ca = "a"
[spool]
folder = "/spool"
[cache]
connection_string = "x"
"""


def load(tmp_path: Path, content: str) -> Config:
    path = tmp_path / "process_server.toml"
    path.write_text(content)
    path.chmod(0o600)
    return Config.load(str(path), {})


def test_little_is_needed(tmp_path: Path) -> None:
    config = load(tmp_path, WHOLE)
    assert config.listen.port == PORT_DEFAULT
    assert config.machines == ()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (WHOLE + "uploads = 3\n", "cache.uploads: unknown key"),
        (WHOLE.replace('folder = "/spool"', ""), "spool.folder"),
        (WHOLE + 'connection_string_file = "f"\n', "either connection_string or"),
        (WHOLE.replace('connection_string = "x"', ""), "either connection_string or"),
        (WHOLE + "uploads_max = 0\n", "cache.uploads_max"),
        (f'machines = ["web-01"]\n{WHOLE}', "machines.0"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, content)
    assert told in str(caught.value)


def test_connection_string_comes_from_its_file(tmp_path: Path) -> None:
    named = tmp_path / "connection"
    content = WHOLE.replace('connection_string = "x"', f'connection_string_file = "{named}"')
    with pytest.raises(ConfigError, match="cannot read the connection string"):
        load(tmp_path, content).cache.read_connection_string()
    named.write_text("AccountName=x\n")
    named.chmod(0o640)
    with pytest.raises(ConfigError, match="can be read by others"):
        load(tmp_path, content).cache.read_connection_string()
    named.chmod(0o600)
    assert load(tmp_path, content).cache.read_connection_string() == "AccountName=x"
    assert "AccountName" not in repr(load(tmp_path, WHOLE))

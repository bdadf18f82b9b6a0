"""What the agent may be told, and what it refuses with the key's name."""

import os
import uuid
from pathlib import Path

import pytest

from agents.mobility.config import AgentConfig
from replication.errors import ConfigError
from replication.manifest import SEGMENT_BYTES_MAX

MACHINE = uuid.UUID(int=3)


def written(folder: Path, *, edit: tuple[str, str] = ("", ""), more: str = "") -> str:
    text = f"""
machine = "{MACHINE}"
data_key_file = "{folder}/key"
state_folder = "{folder}/state"
process_server = "https://appliance:9443"
tls = {{ certificate = "a.crt", key = "a.key", ca = "ca.pem" }}
disks = [{{ index = 0, device = "/dev/sda" }}, {{ index = 1, device = "/dev/sdb", name = "data" }}]
{more}
"""
    path = folder / "agent.toml"
    path.write_text(text.replace(*edit))
    return str(path)


def load(folder: Path, **changes: object) -> AgentConfig:
    return AgentConfig.load(written(folder, **changes), {})  # type: ignore[arg-type]


def test_smallest_configuration_is_whole(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.machine == MACHINE
    assert config.tracker == "ebpf"
    assert [disk.shape(1024).name for disk in config.disks] == ["/dev/sda", "data"]
    assert config.send.segment_bytes + (2 << 20) <= SEGMENT_BYTES_MAX


def test_environment_wins(tmp_path: Path) -> None:
    environ = {"UNDERSTUDY_CAPTURE__INTERVAL_SECONDS": "2.5", "UNDERSTUDY_TRACKER": "scan"}
    config = AgentConfig.load(written(tmp_path), environ)
    assert (config.capture.interval_seconds, config.tracker) == (2.5, "scan")


@pytest.mark.parametrize(
    ("edit", "more", "told"),
    [
        (("", ""), "[capture]\nintervall_seconds = 5", "capture.intervall_seconds: unknown key"),
        (("", ""), "colour = 1", "colour: unknown key"),
        (("index = 1", "index = 0"), "", "two disks have the same index"),
        (("/dev/sdb", "/dev/sda"), "", "two disks have the same device"),
        (("/dev/sdb", "/dev/../dev/sda"), "", "two disks have the same device"),
        (("index = 1", "index = 64"), "", "disks.1.index"),
        (("https://", "http://"), "", "process_server: an https URL"),
        (("9443", "9443/v1"), "", "process_server: an https URL"),
        (("9443", "9443?x=1"), "", "process_server: an https URL"),
        (("https://", "https://user:word@"), "", "process_server: an https URL"),
        (("9443", "port"), "", "process_server: an https URL"),
        ((str(MACHINE), "seven"), "", "machine"),
        (("", ""), "[capture]\npause_share_max = 0", "capture.pause_share_max"),
        (("", ""), "[capture]\nfreeze_seconds_max = 61", "capture.freeze_seconds_max"),
        (("", ""), "[send]\nsegment_bytes = 40000000", "send.segment_bytes"),
        (("", ""), '[capture]\nraw_capture = "guess"', "capture.raw_capture"),
        (("", ""), "[app_consistency]\ninterval_seconds = -1", "app_consistency.interval_seconds"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    tmp_path: Path, edit: tuple[str, str], more: str, told: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, edit=edit, more=more)
    assert told in str(caught.value)


def test_same_disk_by_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sda").write_bytes(b"")
    os.symlink(tmp_path / "sda", tmp_path / "by-id")
    edit = ('"/dev/sda" }, { index = 1, device = "/dev/sdb"',
            f'"{tmp_path}/sda" }}, {{ index = 1, device = "{tmp_path}/by-id"')  # fmt: skip
    with pytest.raises(ConfigError, match="same device"):
        load(tmp_path, edit=edit)


def test_data_key_is_read_and_must_be_private(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ConfigError, match="cannot read the data key"):
        config.data_key()
    key = tmp_path / "key"
    key.write_text("ab" * 32)
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="read by others"):
        config.data_key()
    key.chmod(0o600)
    assert config.data_key() == b"\xab" * 32
    key.write_text("ab" * 31)
    with pytest.raises(ConfigError, match="31 bytes"):
        config.data_key()

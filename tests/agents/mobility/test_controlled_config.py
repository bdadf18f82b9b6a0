"""The file of an agent that follows a config server, and what an assignment makes of it."""

import uuid
from pathlib import Path

import pytest

from agents.mobility.config import AgentConfig
from agents.mobility.controlled_config import ControlledConfig, assigned_config, load_config
from daemon.tls import TlsFiles
from replication.control.assignment import AssignedDisk, MachineAssignment
from replication.control.report import BlockDevice
from replication.errors import ConfigError, PeerError

MACHINE = uuid.UUID(int=5)
TLS = TlsFiles(certificate="c", key="k", ca="a")
DEVICES = (
    BlockDevice(id="/dev/disk/by-id/wwn-1", device="/dev/sdc", size_bytes=1),
    BlockDevice(id="/img/b", device="/dev/loop7", size_bytes=1),
)
CONTROLLED = """
state_folder = "/state"
tracker = "scan"
[control]
config_server = "https://appliance"
identity_folder = "/identity"
[capture]
interval_seconds = 77
audit_chunks = 3
[app_consistency]
pre = ["/etc/understudy/pre"]
"""
STATIC = f"""
machine = "{MACHINE}"
data_key_file = "/key"
state_folder = "/state"
process_server = "https://appliance:9443"
disks = [{{ index = 0, device = "/dev/sda" }}]
tls = {{ certificate = "c", key = "k", ca = "a" }}
"""


def load(folder: Path, text: str, **environ: str) -> AgentConfig | ControlledConfig:
    path = folder / "agent.toml"
    path.write_text(text)
    return load_config(str(path), environ)


def controlled(folder: Path) -> ControlledConfig:
    config = load(folder, CONTROLLED)
    assert isinstance(config, ControlledConfig)
    return config


def assignment(**changes: object) -> MachineAssignment:
    tree: dict[str, object] = {
        "version": 3,
        "machine": MACHINE,
        "name": "db",
        "protected": True,
        "replicate": True,
        "process_server": "https://appliance:9443",
        "disks": (
            AssignedDisk(index=4, device="/dev/disk/by-id/wwn-1", name="data", size_bytes=1),
        ),
        "interval_seconds": 5.0,
        "app_interval_seconds": 3600.0,
    }
    return MachineAssignment.model_validate(tree | changes)


def follow(folder: Path, **changes: object) -> AgentConfig:
    return assigned_config(
        controlled(folder), assignment(**changes), DEVICES, tls=TLS, data_key_file="/key"
    )


def test_section_control_decides_what_the_file_is(tmp_path: Path) -> None:
    assert isinstance(load(tmp_path, STATIC), AgentConfig)
    assert isinstance(load(tmp_path, CONTROLLED), ControlledConfig)
    server = {"UNDERSTUDY_CONTROL__CONFIG_SERVER": "https://x"}
    folder = {"UNDERSTUDY_CONTROL__IDENTITY_FOLDER": "/y"}
    named = load(tmp_path, 'state_folder = "/state"', **server, **folder)
    assert isinstance(named, ControlledConfig)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (CONTROLLED.replace("tracker", f'machine = "{MACHINE}"\ntracker'), "machine: unknown key"),
        (CONTROLLED.replace("https", "http"), "control.config_server"),
        ("=", "is not TOML"),
        ('state_folder = "/s"', "machine: Field required"),
    ],
)
def test_file_that_is_neither_names_the_key(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        load(tmp_path, text)


def test_assignment_and_file_make_one_configuration(tmp_path: Path) -> None:
    config = follow(tmp_path)
    assert (config.machine, config.name, config.data_key_file) == (MACHINE, "db", "/key")
    assert [(disk.index, disk.device, disk.name) for disk in config.disks] == [
        (4, "/dev/sdc", "data")
    ]
    assert (config.tracker, config.capture.interval_seconds, config.capture.audit_chunks) == (
        "scan",
        5.0,
        3,
    )
    assert config.app_consistency.interval_seconds == 3600.0
    assert config.app_consistency.pre == ("/etc/understudy/pre",)
    assert config.tls == TLS


def test_disk_that_is_not_here_is_named(tmp_path: Path) -> None:
    gone = AssignedDisk(index=1, device="/dev/disk/by-id/wwn-9", name="log", size_bytes=1)
    with pytest.raises(ConfigError, match=r"disk 1, log, is not on this machine: .*wwn-9"):
        follow(tmp_path, disks=(gone,))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"process_server": ""}, "process_server"),
        ({"disks": ()}, "disks"),
        ({"interval_seconds": 0}, r"capture\.interval_seconds"),
    ],
)
def test_assignment_that_nobody_could_follow_is_refused(
    changes: dict[str, object], told: str, tmp_path: Path
) -> None:
    with pytest.raises(PeerError, match=f"assignment 3 cannot be followed: {told}"):
        follow(tmp_path, **changes)

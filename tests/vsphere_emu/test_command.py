import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vsphere_emu.conftest import is_alive
from vsphere_emu import block_device

CONFIG = """root_folder = "{folder}/root"
datastore = {{ folder = "{folder}/store" }}

[[guests]]
name = "web-01"
disks = [{{ name = "www", size_bytes = 33554432, file_system = "ext4" }}]
workload = {{ kind = "web", disk = "www" }}

[[guests]]
name = "raw-01"
disks = [{{ name = "disk", size_bytes = 4194304 }}]
"""


class Command:
    """``python -m vsphere_emu`` with one configuration."""

    def __init__(self, config: Path) -> None:
        self.config = config

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vsphere_emu", "--config", str(self.config)]
        return subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=60, check=False
        )


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    config = tmp_path / "vsphere.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    command = Command(config)
    try:
        yield command
    finally:
        done = command("remove", "--delete-disks")
        assert done.returncode == 0, done.stderr


def test_lab_life_from_on_to_removed(command: Command, tmp_path: Path) -> None:
    assert command("power-on").returncode == 0
    done = command("--json", "workload", "start")
    assert done.returncode == 0, done.stderr
    web, raw = json.loads(done.stdout)["guests"]
    assert web["is_powered_on"]
    assert raw["is_powered_on"]
    assert web["workload_pid"] is not None
    assert raw["workload_pid"] is None
    assert web["disks"][0]["mount"] == f"{tmp_path}/root/guests/web-01/www"
    assert web["disks"][0]["vmdk"] == "[datastore1] web-01/www.vmdk"
    told = command("workload", "status", "web-01").stdout
    assert f"web-01: on, web (process {web['workload_pid']})" in told
    assert "raw-01" not in told
    assert command("remove", "--delete-disks").returncode == 0
    assert not is_alive(web["workload_pid"])
    assert block_device.loops_of(web["disks"][0]["flat_path"]) == ()
    assert not [one for one in block_device.mounts() if str(tmp_path) in one.point]
    assert os.listdir(tmp_path / "store") == []
    assert not (tmp_path / "root").exists()


def test_remove_keeps_the_disks_unless_told(command: Command, tmp_path: Path) -> None:
    assert command("power-on", "raw-01").returncode == 0
    assert command("remove").returncode == 0
    assert (tmp_path / "store/raw-01/disk.vmdk").exists()


def test_unknown_guest_is_refused_with_the_names(command: Command) -> None:
    done = command("power-on", "web-02")
    assert done.returncode == 2
    assert "there is no guest web-02" in done.stderr
    assert "web-01, raw-01" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("size_bytes = 4194304", "size_bytes = 4194305", "multiple of 4096"),
        ("size_bytes = 4194304", "size = 4194304", "size: unknown key"),
        ('"ext4"', '"ntfs"', "guests.0.disks.0.file_system"),
        ('disk = "www" }', 'disk = "wwx" }', "the workload needs a disk"),
        ('name = "raw-01"', 'name = "web-01"', "two guests share a name"),
        ('name = "raw-01"', 'name = "../raw"', "is no name"),
        ('kind = "web"', 'kind = "mail"', "guests.0.workload"),
    ],
)
def test_wrong_configuration_is_refused_by_key(
    tmp_path: Path, old: str, new: str, reason: str
) -> None:
    text = CONFIG.format(folder=tmp_path)
    assert old in text
    config = tmp_path / "wrong.toml"
    config.write_text(text.replace(old, new))
    done = Command(config)("status")
    assert done.returncode == 2
    assert reason in done.stderr
    assert "Traceback" not in done.stderr

"""The disk that brings a machine its agent, read back from its image."""

import subprocess
import sys
from pathlib import Path

import pytest

from deploy.lab.agent_disk import LABEL, AgentDisk


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is on the disk, in a folder."""
    folder = tmp_path_factory.mktemp("agent")
    image, content = folder / "agent.img", folder / "content"
    disk = AgentDisk("vm-01", 'state_folder = "/agent/state"\n', "secret", "10.0.2.2", (9444, 9443))
    disk.write(str(image))
    label = subprocess.run(["e2label", image], check=True, capture_output=True, text=True).stdout
    assert label.strip() == LABEL
    assert [path.name for path in folder.iterdir()] == ["agent.img"]
    content.mkdir()
    subprocess.run(
        ["debugfs", "-R", f"rdump / {content}", str(image)], check=True, capture_output=True
    )
    return content


def test_agent_starts_from_what_is_on_the_disk_alone(content: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _RUN, f"{content}/lib", f"{content}/source"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert "Replicates the disks of this machine." in done.stdout
    assert (content / "source/agents/mobility/tracker/dirty.bpf.o").exists()
    for package in ("source/agents/mobility", "lib/aiohttp"):
        sources = list((content / package).glob("*.py"))
        assert len(list((content / package / "__pycache__").glob("*.pyc"))) >= len(sources) > 5


_RUN = """
import importlib.metadata, sys
sys.path += sys.argv[1:]
importlib.metadata.version("understudy")
sys.argv[1:] = ["--help"]
from agents.mobility.__main__ import main
main()
"""


def test_start_enrols_first_and_reaches_the_appliance_by_loopback(content: Path) -> None:
    script = (content / "start").read_text()
    subprocess.run(["sh", "-n", content / "start"], check=True)
    assert (content / "start").stat().st_mode & 0o777 == 0o755
    assert "for port in 9444 9443; do" in script
    assert "systemd-socket-proxyd 10.0.2.2:$port" in script
    assert "enrol --name vm-01 --passphrase-file passphrase" in script
    assert (content / "passphrase").read_text() == "secret"
    assert (content / "passphrase").stat().st_mode & 0o777 == 0o600

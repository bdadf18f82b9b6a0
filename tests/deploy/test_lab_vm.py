"""The lab with a virtual machine as its source, as a person runs it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.small_site import free_hundred

LAB_SECONDS_MAX = 3000


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[list[str]]:
    """The command of a lab of one's own; taken down whatever happens."""
    base = free_hundred()
    command = [sys.executable, "-m", "deploy.lab", "--folder", str(tmp_path / "lab")]
    command += ["--port-base", str(base)]
    try:
        yield command
    finally:
        subprocess.run([*command, "down"], check=False, timeout=120)


@pytest.mark.soak
@pytest.mark.timeout(LAB_SECONDS_MAX + 200)
def test_point_of_a_machine_that_replicates_itself_boots(lab: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [*lab, "vm"], capture_output=True, text=True, timeout=LAB_SECONDS_MAX, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "it boots to its login prompt" in done.stdout
    assert "the source has gone on meanwhile" in done.stdout
    down = subprocess.run([*lab, "down"], capture_output=True, text=True, timeout=120, check=False)
    assert down.returncode == 0, down.stderr
    assert not (tmp_path / "lab").exists()
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [command for command in commands if str(tmp_path / "lab").encode() in command]

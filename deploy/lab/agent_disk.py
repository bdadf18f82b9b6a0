"""The disk that brings a machine its agent: code, configuration, passphrase, and room for state.

The code is this checkout's, and the libraries are those of this very environment: Debian 12 has
the same Python (3.11). Only what the agent imports is taken.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass

from daemon.durable import storage_error
from replication.errors import ReplicationError
from vsphere_emu.tool import run_tool

LABEL = "agent"
SIZE_BYTES = 512 << 20
SOURCE_PACKAGES = ("agents", "daemon", "replication")
SHARED_LIBRARIES = "libs"
"""The folder ``numpy.libs`` belongs to the package beside it."""

_LIST_IMPORTED = """
import json, sys
import agents.mobility.__main__, agents.mobility.controlled
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

_START = """\
#!/bin/sh
# Enrols once, then runs the agent. The appliance's ports are this machine's own loopback ports:
# each is forwarded to the host.
set -eu
cd /agent
export PYTHONPATH=/agent/lib:/agent/source PYTHONDONTWRITEBYTECODE=1
for port in {ports}; do
    systemd-socket-activate --listen=127.0.0.1:$port \\
        /lib/systemd/systemd-socket-proxyd {host}:$port &
done
if [ -e passphrase ]; then
    python3 -m agents.mobility --config agent.toml enrol --name {name} --passphrase-file passphrase
    rm passphrase
    sync .
fi
exec python3 -m agents.mobility --config agent.toml
"""


@dataclass(frozen=True, slots=True)
class AgentDisk:
    """What the disk holds. host, ports: where the appliance is, as the machine sees it."""

    name: str
    config: str
    passphrase: str
    host: str
    ports: tuple[int, ...]

    def write(self, image: str) -> None:
        """Make the disk image, whole or not at all. Raises ReplicationError, StorageError."""
        folder = os.path.dirname(image)
        with tempfile.TemporaryDirectory(prefix="agent-disk-", dir=folder) as work:
            content = os.path.join(work, "content")
            pending = os.path.join(work, "disk.img")
            try:
                _copy_code(content)
                self._write_files(content)
                with open(pending, "wb") as file:
                    file.truncate(SIZE_BYTES)
                run_tool("mkfs.ext4", "-q", "-F", "-L", LABEL, "-d", content, pending)
                os.rename(pending, image)
            except OSError as error:
                raise storage_error("write", image, error) from error

    def _write_files(self, content: str) -> None:
        start = _START.format(ports=" ".join(map(str, self.ports)), host=self.host, name=self.name)
        for name, text, mode in (
            ("start", start, 0o755),
            ("agent.toml", self.config, 0o644),
            ("passphrase", self.passphrase, 0o600),
        ):
            path = os.path.join(content, name)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT, mode), "w") as file:
                file.write(text)


def _copy_code(content: str) -> None:
    """The checkout's packages, and the libraries that they import."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for package in SOURCE_PACKAGES:
        target = os.path.join(content, "source", package)
        shutil.copytree(os.path.join(root, package), target)
    libraries = os.path.join(content, "lib")
    os.mkdir(libraries)
    wanted = _imported(root)
    place = sysconfig.get_path("platlib")
    for entry in sorted(os.listdir(place)):
        name, _, kind = entry.partition(".")
        path, target = os.path.join(place, entry), os.path.join(libraries, entry)
        if entry.startswith("understudy-") and entry.endswith(".dist-info"):
            shutil.copytree(path, target)  # what the agent tells of its own version
        elif name in wanted and os.path.isfile(path):
            shutil.copy2(path, target)
        elif name in wanted and kind in ("", SHARED_LIBRARIES):
            shutil.copytree(path, target, ignore=shutil.ignore_patterns("tests"))
    # What is not compiled yet: an emulated processor would take minutes over it, at each start.
    run_tool(sys.executable, "-m", "compileall", "-q", content)


def _imported(root: str) -> set[str]:
    """Names of all modules that a running agent has, the standard library's too."""
    done = subprocess.run(
        [sys.executable, "-c", _LIST_IMPORTED],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ReplicationError(f"the agent cannot be imported: {done.stderr.strip()[-500:]}")
    names: list[str] = json.loads(done.stdout)
    return set(names)

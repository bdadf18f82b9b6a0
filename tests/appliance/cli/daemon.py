"""A config server as a process of its own, and the command line as a person types it."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from appliance.config_server.administration import make_token
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.identity.administration import show_ca
from replication.control.role import OperatorRole

START_SECONDS_MAX = 150
_CONFIG = """
state_folder = "{folder}/state"
[listen]
host = "127.0.0.1"
port = {port}
[identity]
unlock_file = "{folder}/unlock"
[watching]
evaluate_seconds = 0.2
settle_seconds = 0
clear_seconds = 0
"""


@dataclass
class Daemon:
    """A running config server; ``database``: its URL."""

    folder: Path
    port: int
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def database(self) -> str:
        return f"sqlite+aiosqlite:///{self.folder}/state/config-server.db"

    @property
    def config(self) -> ConfigServerConfig:
        return ConfigServerConfig.load(str(self.folder / "config.toml"), {})

    def ca(self, *, fingerprint: bool = False) -> str:
        """As its own host tells it."""
        return asyncio.run(show_ca(self.config, fingerprint=fingerprint))

    def token(self, name: str, role: OperatorRole) -> Path:
        """A file with a new token, made on its own host."""
        path = self.folder / f"{name}.token"
        path.write_text(asyncio.run(make_token(self.config, name, role, days=1)) + "\n")
        return path

    def start(self) -> None:
        self.process = subprocess.Popen(_program(self.folder), stderr=subprocess.DEVNULL)
        until = time.monotonic() + START_SECONDS_MAX
        while True:
            assert self.process.poll() is None, "the config server has ended"
            assert time.monotonic() < until, "the config server is not ready"
            with contextlib.suppress(httpx.HTTPError):
                httpx.get(f"{self.url}/api/v1/healthz", verify=False, timeout=5)
                return
            time.sleep(0.1)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None


def _program(folder: Path) -> list[str]:
    return [
        sys.executable, "-m", "appliance.config_server", "--config", str(folder / "config.toml"),
    ]  # fmt: skip


@contextlib.contextmanager
def run_daemon(folder: Path, port: int) -> Iterator[Daemon]:
    """Start one with its state in ``folder``; end it."""
    (folder / "config.toml").write_text(_CONFIG.format(folder=folder, port=port))
    unlock = folder / "unlock"
    unlock.write_bytes(os.urandom(32).hex().encode())
    unlock.chmod(0o600)
    daemon = Daemon(folder, port)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.stop()

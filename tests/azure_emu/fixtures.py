"""A storage account on real Azurite, in a process of its own, for any test that needs one.

In a conftest: ``from tests.azure_emu.fixtures import azurite  # noqa: F401``.
"""

import base64
import contextlib
import os
import secrets
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.preloaded import Forked, start_daemon

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 15.0


class EmulatorProcess:
    """``python -m azure_emu`` on free ports, with its data in ``folder``.

    pid: of the emulator; ``service_pids`` are those of Azurite's processes below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.account = "understudytest"
        self.key = base64.b64encode(secrets.token_bytes(64)).decode()
        self.blob_port, self.queue_port = free_ports(2)
        self.log = folder / "emulator.log"
        self.config = folder / "emulator.toml"
        self._process: Forked | None = None
        key_file = folder / "account.key"
        key_file.write_text(self.key)
        key_file.chmod(0o600)
        self.config.write_text(
            f"""[storage]
data_folder = "{folder}/data"
blob_port = {self.blob_port}
queue_port = {self.queue_port}
account = {{ name = "{self.account}", key_file = "{key_file}" }}
"""
        )

    @property
    def connection_string(self) -> str:
        host = "http://127.0.0.1"
        return (
            f"DefaultEndpointsProtocol=http;AccountName={self.account};AccountKey={self.key};"
            f"BlobEndpoint={host}:{self.blob_port}/{self.account};"
            f"QueueEndpoint={host}:{self.queue_port}/{self.account};"
        )

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def service_pids(self) -> tuple[int, ...]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text()
        return tuple(int(pid) for pid in children.split())

    def start(self) -> None:
        """Start, and return when the account answers."""
        assert self._process is None, "started already"
        with self.log.open("wb") as log:
            self._process = start_daemon(
                "azure_emu", "--config", str(self.config), log_fd=log.fileno()
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while f"cache storage account {self.account}".encode() not in self.log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"Azurite did not start: {self.log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        process, self._process = self._process, None
        assert process is not None, "not started"
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_SECONDS_MAX)
        finally:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """SIGKILL the emulator and with it Azurite, which forgets its last seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for port in (self.blob_port, self.queue_port):
            await_closed(port)

    def kill_services(self) -> None:
        """SIGKILL Azurite's processes; the emulator restarts them."""
        for pid in self.service_pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def free_ports(count: int) -> tuple[int, ...]:
    """TCP ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return tuple(one.getsockname()[1] for one in sockets)


def await_closed(port: int) -> None:
    deadline = time.monotonic() + STOP_SECONDS_MAX
    while time.monotonic() < deadline:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.02)
    raise AssertionError(f"port {port} is still served")


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatorProcess]:
    emulator = EmulatorProcess(tmp_path_factory.mktemp("azurite"))
    emulator.start()
    try:
        yield emulator
    finally:
        emulator.kill()

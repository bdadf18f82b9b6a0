"""The real daemon, the real commands, real TLS."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from appliance.config_server.administration import make_token
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.identity.administration import (
    change_unlock_file,
    rotate_passphrase,
    show_passphrase,
)
from daemon.control_client import ControlClient
from daemon.control_config import ControlConfig
from daemon.enrolment import enrol
from daemon.identity import NodeIdentity
from daemon.service import Health
from replication.control.assignment import ApplierAssignment
from replication.control.enrolment import PassphraseKind
from replication.control.report import ApplierReport
from replication.control.role import NodeRole, OperatorRole
from replication.errors import ConfigError
from tests.appliance.config_server.postgresql import PostgreSQL

START_SECONDS_MAX = 90.0


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@dataclass(slots=True)
class Daemon:
    """A config server's configuration and, while it runs, its process."""

    folder: Path
    port: int
    process: "subprocess.Popen[str] | None" = None

    @classmethod
    def configured(cls, folder: Path, database_url: str = "") -> "Daemon":
        folder.mkdir(exist_ok=True)
        unlock = folder / "unlock"
        if not unlock.exists():
            unlock.touch(0o600)
            unlock.write_text("the unlock passphrase of a test")
        port = free_port()
        database = f'[database]\nurl = "{database_url}"\n' if database_url else ""
        config = folder / "config-server.toml"
        config.touch(0o600)
        config.write_text(
            f'state_folder = "{folder}/state"\n'
            f'[listen]\nhost = "127.0.0.1"\nport = {port}\n'
            f'[identity]\nunlock_file = "{unlock}"\n{database}'
        )
        return cls(folder, port)

    @property
    def config(self) -> ConfigServerConfig:
        return ConfigServerConfig.load(str(self.folder / "config-server.toml"))

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self._words(), *words], capture_output=True, text=True, check=False, timeout=120
        )

    def start(self) -> None:
        self.process = subprocess.Popen(self._words(), stderr=subprocess.PIPE, text=True)

    def wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS_MAX
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        url = f"https://127.0.0.1:{self.port}/api/v1/healthz"
        while time.monotonic() < until:
            assert self.process is not None
            assert self.process.poll() is None, self.process.communicate()[1]
            with contextlib.suppress(OSError), urllib.request.urlopen(url, context=context):
                return
            time.sleep(0.05)
        raise AssertionError("the config server did not come up")

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        process.send_signal(signum)
        process.communicate(timeout=60)
        return process.returncode

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            self.wait_until_ready()
            yield
        finally:
            if self.process is not None:
                self.process.kill()
                self.process.communicate()
                self.process = None

    def control(self, name: str) -> ControlConfig:
        return ControlConfig(
            config_server=f"https://localhost:{self.port}",
            identity_folder=str(self.folder / name),
            report_seconds=0.3,
            wait_seconds=10,
        )

    def _words(self) -> list[str]:
        config = str(self.folder / "config-server.toml")
        return [sys.executable, "-m", "appliance.config_server", "--config", config]


def api(daemon: Daemon, identity: NodeIdentity, token: str, method: str, path: str) -> object:
    """An operator's request, over TLS that is checked against the CA that the node has."""
    context = ssl.create_default_context(cafile=identity.tls.ca)
    request = urllib.request.Request(
        f"https://localhost:{daemon.port}/api/v1/{path}",
        method=method,
        headers={"Authorization": f"Bearer {token}"},
    )
    with urllib.request.urlopen(request, context=context, timeout=30) as answer:
        return json.load(answer)


async def test_a_node_enrols_follows_and_is_revoked_across_restarts(tmp_path: Path) -> None:
    daemon = Daemon.configured(tmp_path)
    shown = await asyncio.to_thread(daemon.command, "passphrase", "--for", "appliance")
    assert shown.returncode == 0, shown.stderr
    token = await make_token(daemon.config, "me", OperatorRole.CONTRIBUTOR, days=1)
    config = daemon.control("applier")
    with daemon.running():
        identity = await enrol(config, shown.stdout, NodeRole.APPLIER, name="applier-1")
        daemon.stop(signal.SIGKILL)
        daemon.start()
        daemon.wait_until_ready()
        health, stop = Health(), asyncio.Event()

        async def report() -> ApplierReport:
            return ApplierReport(time_ns=time.time_ns())

        async with ControlClient(config, ApplierAssignment, health=health, stop=stop) as client:
            running = asyncio.create_task(client.run(report))
            async with asyncio.timeout(30):
                async for assignment in client.assignments():
                    assert assignment.version >= 1
                    break
            path = f"certificates/{identity.serial}/revoke"
            began = time.monotonic()
            await asyncio.to_thread(api, daemon, identity, token, "POST", path)
            async with asyncio.timeout(30):
                while not health.criticals:  # noqa: ASYNC110 - a plain record, no event
                    await asyncio.sleep(0.05)
            assert time.monotonic() - began < 10
            stop.set()
            await running
        listed = await asyncio.to_thread(api, daemon, identity, token, "GET", "certificates")
        assert isinstance(listed, dict)
        assert [item["revoked_ns"] is None for item in listed["items"]] == [False]
        assert daemon.stop() == 0


@pytest.mark.parametrize("damage", ["unlock", "keyring"])
async def test_a_wrong_unlock_file_or_a_lost_keyring_ends_with_words(
    tmp_path: Path, damage: str
) -> None:
    daemon = Daemon.configured(tmp_path)
    await show_passphrase(daemon.config)
    keyring = tmp_path / "state" / "identity" / "keyring.sealed"
    content = keyring.read_bytes()
    if damage == "unlock":
        (tmp_path / "unlock").write_text("not the one that it was made with")
    else:
        keyring.unlink()
    ended = await asyncio.to_thread(daemon.command)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    told = "does not open" if damage == "unlock" else "is missing"
    assert told in ended.stderr
    assert [path.read_bytes() for path in keyring.parent.iterdir()] == (
        [content] if damage == "unlock" else []
    )


async def test_resealed_it_opens_under_the_new_file(tmp_path: Path) -> None:
    config = Daemon.configured(tmp_path).config
    before = await show_passphrase(config)
    of_appliance = await show_passphrase(config, PassphraseKind.APPLIANCE)
    assert of_appliance != before
    new = tmp_path / "new-unlock"
    new.touch(0o600)
    new.write_text("quite another unlock passphrase")
    assert str(new) in await change_unlock_file(config, str(new))
    with pytest.raises(ConfigError, match="does not open"):
        await show_passphrase(config)
    os.replace(new, tmp_path / "unlock")
    assert await show_passphrase(config) == before
    rotated = await rotate_passphrase(config)
    assert rotated != before
    assert await show_passphrase(config) == rotated
    assert await show_passphrase(config, PassphraseKind.APPLIANCE) == of_appliance


async def test_two_config_servers_of_one_database_are_one(
    tmp_path: Path, postgresql: PostgreSQL
) -> None:
    """One CA, one passphrase; what one changes wakes who waits at the other."""
    with postgresql.database() as url:
        first = Daemon.configured(tmp_path / "first", url)
        second = Daemon.configured(tmp_path / "second", url)
        passphrase = await show_passphrase(first.config, PassphraseKind.APPLIANCE)
        token = await make_token(first.config, "me", OperatorRole.CONTRIBUTOR, days=1)
        with pytest.raises(ConfigError, match="is missing") as refused:
            await show_passphrase(second.config)
        assert "copy it from the other config server" in str(refused.value.hint)
        (tmp_path / "second" / "state" / "identity").mkdir(parents=True, mode=0o700)
        shutil.copy(tmp_path / "first" / "unlock", tmp_path / "second" / "unlock")
        keyring = "state/identity/keyring.sealed"
        shutil.copy(tmp_path / "first" / keyring, tmp_path / "second" / keyring)
        with first.running(), second.running():
            identity = await enrol(
                first.control("ps"),
                passphrase,
                NodeRole.APPLIER,
                name="applier-1",
                node=uuid.UUID(int=77),
            )
            health, stop = Health(), asyncio.Event()
            config = first.control("ps").model_copy(
                update={"config_server": f"https://localhost:{second.port}"}
            )

            async def report() -> ApplierReport:
                return ApplierReport(time_ns=time.time_ns())

            client = ControlClient(config, ApplierAssignment, health=health, stop=stop)
            async with client:
                running = asyncio.create_task(client.run(report))
                async with asyncio.timeout(30):
                    await anext(client.assignments())
                path = f"certificates/{identity.serial}/revoke"
                began = time.monotonic()
                await asyncio.to_thread(api, first, identity, token, "POST", path)
                async with asyncio.timeout(30):
                    while not health.criticals:  # noqa: ASYNC110 - a plain record, no event
                        await asyncio.sleep(0.05)
                assert time.monotonic() - began < 10
                stop.set()
                await running
            with pytest.raises(urllib.error.HTTPError, match="404"):
                await asyncio.to_thread(api, second, identity, token, "GET", "nothing")

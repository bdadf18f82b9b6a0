"""Scripts over SSH, against a real server on loopback that runs real commands."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from tests.appliance.config_server.recovery.actions.orders import runner, script
from tests.appliance.config_server.recovery.actions.test_local import until_gone


@dataclass
class Host:
    """A server that lets one key in as ``dr``; commands run in a shell. ``lost``: connections that
    ended.
    """

    port: int
    folder: Path
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    def spec(self, command: str | None = None, **changes: Any) -> dict[str, Any]:
        where = {"host": "127.0.0.1", "port": self.port, "user": "dr", "key_file": "dr.key"}
        where |= {key: changes.pop(key) for key in list(changes) if key in ("user", "key_file")}
        return {"command": command, "where": where, **changes}


class _Server(asyncssh.SSHServer):
    def __init__(self, host: Host) -> None:
        self._host = host

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._host.lost.set()


async def _serve(process: "asyncssh.SSHServerProcess[bytes]") -> None:
    """As a shell would, with its group killed when the session ends."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        "/bin/sh",
        "-c",
        process.command or "",
        start_new_session=True,
        stdin=pipe,
        stdout=pipe,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    closing = asyncio.create_task(process.channel.wait_closed())
    running = asyncio.create_task(_carry(process, child.stdin, child.stdout))
    try:
        await asyncio.wait({running, closing}, return_when=asyncio.FIRST_COMPLETED)
        if running.done() and not closing.done():
            code = await child.wait()
            if code < 0:
                process.exit_with_signal("TERM")
            else:
                process.exit(code)
    finally:
        running.cancel()
        closing.cancel()
        if child.returncode is None:
            os.killpg(child.pid, 9)
            await child.wait()


async def _carry(
    process: "asyncssh.SSHServerProcess[bytes]",
    into: asyncio.StreamWriter,
    out_of: asyncio.StreamReader,
) -> None:
    into.write(await process.stdin.read())
    into.close()
    while part := await out_of.read(1 << 16):
        process.stdout.write(part)
        await process.stdout.drain()


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    keys = tmp_path / "keys"
    keys.mkdir()
    of_host, of_user = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    of_user.write_private_key(str(keys / "dr.key"))
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(keys / "other.key"))
    (keys / "dr.key").chmod(0o600)
    (keys / "other.key").chmod(0o600)
    allowed = tmp_path / "authorized_keys"
    of_user.write_public_key(str(allowed))
    host = Host(0, tmp_path)
    async with asyncssh.listen(
        "127.0.0.1",
        0,
        server_factory=lambda: _Server(host),
        server_host_keys=[of_host],
        authorized_client_keys=str(allowed),
        process_factory=_serve,
        encoding=None,
    ) as server:
        host.port = server.sockets[0].getsockname()[1]
        key = of_host.export_public_key().decode().strip()
        (keys / "known_hosts").write_text(f"[127.0.0.1]:{host.port} {key}\n")
        yield host


async def test_a_command_gets_the_context_and_its_exit_code_decides(host: Host) -> None:
    outcome = await runner(host.folder).run(script(host.spec("cat; echo oops >&2; exit 3")))
    assert (outcome.succeeded, outcome.exit_code) == (False, 3)
    context, rest = outcome.output.split("\n", 1)
    assert json.loads(context)["RecoveryPlanName"] == "shop"
    assert rest == "oops\n"
    outcome = await runner(host.folder).run(script(host.spec(None, inline="echo 'it''s'\n")))
    assert (outcome.succeeded, outcome.output) == (True, "its\n")
    outcome = await runner(host.folder).run(script(host.spec("kill -TERM $$")))
    assert outcome.exit_code == -15
    outcome = await runner(host.folder).run(script(host.spec("head -c 40000000 /dev/zero; echo x")))
    assert outcome.succeeded
    assert outcome.output.endswith("x\n")
    assert "left out" in outcome.output


async def test_a_command_that_hangs_loses_its_session(host: Host) -> None:
    mark = f"3600.{os.getpid()}4"
    outcome = await runner(host.folder).run(script(host.spec(f"sleep {mark}"), seconds_max=2))
    assert not outcome.succeeded
    assert "had not ended after 2 s" in outcome.detail
    async with asyncio.timeout(20):
        await host.lost.wait()
    await until_gone(mark)


async def test_who_is_not_known_is_not_spoken_to(host: Host) -> None:
    known = host.folder / "keys" / "known_hosts"
    other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
    for text in ("", f"[127.0.0.1]:{host.port} {other}"):
        known.write_text(text)
        outcome = await runner(host.folder).run(script(host.spec("true")))
        assert not outcome.succeeded
        assert "host's key is not the one in" in outcome.detail


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"key_file": "other.key"}, "does not let the key"),
        ({"key_file": "absent"}, "there is no file"),
        ({"key_file": "known_hosts"}, "others may read the key"),
    ],
)
async def test_only_keys_of_the_administrators_open(
    host: Host, changes: dict[str, str], told: str
) -> None:
    outcome = await runner(host.folder).run(script(host.spec("true", **changes)))
    assert not outcome.succeeded
    assert told in outcome.detail


async def test_hosts_that_are_away_and_keys_that_are_none_are_outcomes(host: Host) -> None:
    spec = host.spec("true")
    spec["where"]["port"] = 1
    outcome = await runner(host.folder).run(script(spec))
    assert "dr@127.0.0.1:1" in outcome.detail
    (host.folder / "keys" / "dr.key").write_text("no key")
    outcome = await runner(host.folder).run(script(host.spec("true")))
    assert "a file for SSH cannot be used" in outcome.detail
    outcome = await runner(host.folder, keys_folder=None).run(script(host.spec("true")))
    assert "no keys for SSH" in outcome.detail

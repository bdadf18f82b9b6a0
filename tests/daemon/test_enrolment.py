"""The node's half of enrolment, against the real config server over TLS, and against impostors."""

import argparse
import asyncio
import contextlib
import datetime as dt
import os
import socket
import ssl
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from appliance.config_server.identity.keyring import Keyring
from appliance.config_server.identity.server_certificate import ServerCertificate
from daemon.certificates import SERVER, certificate_der, certificate_pem, key_pem, new_key, subject
from daemon.control_call import RefusedError
from daemon.control_config import ControlConfig
from daemon.enrolment import add_enrol_options, enrol, enrol_command, read_passphrase
from daemon.identity import PENDING_KEY_FILE, is_enrolled, load, pending_key, read_record
from replication.control.enrolment import Challenge, derive_key, server_proof
from replication.control.role import NodeRole
from replication.errors import ConfigError, PeerError, UnavailableError
from tests.appliance.config_server.control import open_control

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def test_each_role_enrols(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        for role in NodeRole:
            config = control.config(role)
            identity = await control.enrol(role, config=config)
            assert load(config.identity_folder) == identity
            assert identity.role is role
            assert os.stat(config.identity_folder).st_mode & 0o077 == 0


async def test_a_machine_brings_its_id_and_others_choose_one_once(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        machine = uuid.uuid4()
        assert (await control.enrol(NodeRole.MACHINE, node=machine)).node == machine
        config = control.config("applier")
        with pytest.raises(PeerError, match="does not prove"):
            await control.enrol(NodeRole.APPLIER, config=config, passphrase="wrong-one")
        chosen = read_record(config.identity_folder)
        assert chosen is not None
        assert (await control.enrol(NodeRole.APPLIER, config=config)).node == chosen.id


async def test_an_enrolled_node_does_not_enrol_again_by_accident(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        config = control.config("node")
        first = await control.enrol(NodeRole.APPLIER, config=config)
        with pytest.raises(ConfigError, match="enrolled already"):
            await control.enrol(NodeRole.APPLIER, config=config)
        with pytest.raises(RefusedError, match="another key") as caught:
            await control.enrol(NodeRole.APPLIER, config=config, again=True)
        assert caught.value.status == 409
        assert first.serial in str(caught.value.hint)
        assert load(config.identity_folder) == first
        await control.rig.operator().post(f"certificates/{first.serial}/revoke")
        with pytest.raises(RefusedError, match="known with another key") as caught:
            await control.enrol(NodeRole.APPLIER, config=config, again=True)
        assert f"certificates allow {first.node}" in str(caught.value.hint)
        await control.rig.operator().post(f"certificates/allow/{first.node}")
        again = await control.enrol(NodeRole.APPLIER, config=config, again=True)
        assert (again.node, again.serial == first.serial) == (first.node, False)


async def test_a_pending_key_that_was_revoked_is_given_up(tmp_path: Path) -> None:
    """The node died after it was given a certificate; before it asks again, that was revoked."""
    async with open_control(tmp_path) as control:
        config = control.config("node")
        await control.enrol(NodeRole.APPLIER, config=config)
        identity = load(config.identity_folder)
        pair = (Path(config.identity_folder) / "node.pem").read_bytes()
        pending = Path(config.identity_folder) / PENDING_KEY_FILE
        pending.touch(0o600)
        pending.write_bytes(pair[: pair.index(b"-----BEGIN CERTIFICATE")])
        await control.rig.operator().post(f"certificates/{identity.serial}/revoke")
        await control.rig.operator().post(f"certificates/allow/{identity.node}")
        again = await control.enrol(NodeRole.APPLIER, config=config, again=True)
        assert again.node == identity.node
        assert not pending.exists()


async def test_a_node_that_was_killed_before_its_answer_asks_with_the_same_key(
    tmp_path: Path,
) -> None:
    async with open_control(tmp_path) as control:
        config = control.config("node")
        with pytest.raises(UnavailableError):
            await control.enrol(
                NodeRole.MACHINE, config=config.model_copy(update={"config_server": CLOSED})
            )
        key = pending_key(config.identity_folder)
        await control.enrol(NodeRole.MACHINE, config=config)
        pair = (Path(config.identity_folder) / "node.pem").read_bytes()
        assert pair.startswith(key_pem(key))


CLOSED = "https://localhost:9"
"""The discard port: nobody listens there."""


async def test_a_name_that_is_not_in_the_certificate_is_refused(tmp_path: Path) -> None:
    """Whoever is proved by the first message must also be who answers the second."""
    async with open_control(tmp_path, listen={"names": ["config.example"]}) as control:
        for host, known in (("localhost", True), ("0.0.0.0", False)):  # one address, two names
            config = control.config(host, config_server=f"https://{host}:{control.port}")
            if known:
                await control.enrol(NodeRole.APPLIER, config=config)
                continue
            with pytest.raises(UnavailableError, match="no TLS") as caught:
                await control.enrol(NodeRole.APPLIER, config=config)
            assert "names" in str(caught.value.hint)
            assert not is_enrolled(config.identity_folder)


@contextlib.asynccontextmanager
async def serving(
    context: ssl.SSLContext, challenge: Handler, certificate: Handler | None = None
) -> AsyncIterator[str]:
    """Somebody who passes for a config server."""

    async def nothing(_: web.Request) -> web.StreamResponse:
        raise AssertionError("a node that was not convinced must not send its request")

    app = web.Application()
    app.router.add_post("/api/v1/enrolment/challenges", challenge)
    app.router.add_post("/api/v1/enrolment/certificates", certificate or nothing)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        yield f"https://localhost:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def config_for(tmp_path: Path, url: str) -> ControlConfig:
    return ControlConfig(config_server=url, identity_folder=str(tmp_path / "node"))


def impostor(tmp_path: Path) -> tuple[Keyring, ssl.SSLContext]:

    keyring = Keyring.create()
    folder = str(tmp_path / "impostor")
    server = ServerCertificate(keyring, folder, ["localhost"], dt.timedelta(days=1))
    server.context.verify_mode = ssl.CERT_NONE
    return keyring, server.context


def forged(keyring: Keyring, passphrase: str, body: dict[str, Any]) -> Challenge:
    salt, nonce = bytes(16), bytes(32)
    ca_der = certificate_der(keyring.ca.certificate)
    key = derive_key(passphrase, salt)
    role = NodeRole(body["role"])
    proof = server_proof(key, bytes.fromhex(body["client_nonce"]), nonce, ca_der, role)
    return Challenge(
        challenge=uuid.uuid4(),
        server_nonce=nonce.hex(),
        salt=salt.hex(),
        ca_pem=keyring.ca_pem,
        proof=proof.hex(),
    )


async def test_an_impostor_without_the_passphrase_is_told_nothing(tmp_path: Path) -> None:
    keyring, context = impostor(tmp_path)

    async def challenge(request: web.Request) -> web.StreamResponse:
        answer = forged(keyring, "guessed", await request.json())
        return web.json_response(text=answer.model_dump_json())

    async with serving(context, challenge) as url:
        with pytest.raises(PeerError, match="does not prove") as caught:
            await enrol(config_for(tmp_path, url), "the-real-one", NodeRole.MACHINE, name="web")
        assert "somebody stands between" in str(caught.value.hint)
    assert not is_enrolled(str(tmp_path / "node"))


@pytest.mark.parametrize("swapped", ["ca_pem", "server_nonce", "salt", "proof"])
async def test_whoever_changes_a_challenge_on_the_way_is_refused(
    tmp_path: Path, swapped: str
) -> None:
    """Somebody between passes the real server's challenge on, with a part of his own."""
    keyring, context = impostor(tmp_path)
    async with open_control(tmp_path) as control:
        passphrase = await control.passphrase()

        async def challenge(request: web.Request) -> web.StreamResponse:
            answer = await control.rig.client().post(
                "enrolment/challenges", json=await request.json()
            )
            own = forged(keyring, "guessed", await request.json())
            changed = {**answer.json(), swapped: own.model_dump(mode="json")[swapped]}
            return web.json_response(changed)

        async with serving(context, challenge) as url:
            with pytest.raises(PeerError, match="does not prove"):
                await enrol(config_for(tmp_path, url), passphrase, NodeRole.MACHINE, name="web")


async def test_who_only_passes_on_gets_no_request(tmp_path: Path) -> None:
    """The challenge is right, but the next connection must be the proved CA's own."""
    _, context = impostor(tmp_path)
    async with open_control(tmp_path) as control:
        passphrase = await control.passphrase()

        async def challenge(request: web.Request) -> web.StreamResponse:
            answer = await control.rig.client().post(
                "enrolment/challenges", json=await request.json()
            )
            return web.json_response(answer.json())

        async with serving(context, challenge) as url:
            with pytest.raises(UnavailableError, match="TLS"):
                await enrol(config_for(tmp_path, url), passphrase, NodeRole.MACHINE, name="web")


async def test_a_process_server_cannot_pass_for_the_config_server(tmp_path: Path) -> None:
    """It holds a server's certificate of the right CA, even for the right name."""
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.PROCESS_SERVER)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(identity.tls.certificate)

        async def challenge(request: web.Request) -> web.StreamResponse:
            answer = await control.rig.client().post(
                "enrolment/challenges", json=await request.json()
            )
            return web.json_response(answer.json())

        async with serving(context, challenge) as url:
            with pytest.raises(UnavailableError, match="not that of a config server"):
                await control.enrol(NodeRole.MACHINE, config=config_for(tmp_path, url))


async def test_a_ca_signed_by_nobody_or_an_odd_answer_is_refused(tmp_path: Path) -> None:
    keyring, context = impostor(tmp_path)
    answers: tuple[bytes, ...] = (b"", b"[]", b'{"challenge": 1}', b"\xff" * 100)
    for answer in answers:

        async def challenge(_: web.Request, answer: bytes = answer) -> web.StreamResponse:
            return web.Response(body=answer)

        async with serving(context, challenge) as url:
            with pytest.raises(PeerError, match="no challenge"):
                await enrol(config_for(tmp_path, url), "x", NodeRole.MACHINE, name="web")

    async def not_a_ca(request: web.Request) -> web.StreamResponse:
        own = forged(keyring, "x", await request.json())
        return web.json_response(text=own.model_copy(update={"ca_pem": "x"}).model_dump_json())

    async with serving(context, not_a_ca) as url:
        with pytest.raises(PeerError, match="no certificate"):
            await enrol(config_for(tmp_path, url), "x", NodeRole.MACHINE, name="web")


async def test_a_certificate_for_somebody_else_is_not_taken(tmp_path: Path) -> None:
    keyring, context = impostor(tmp_path)

    async def challenge(request: web.Request) -> web.StreamResponse:
        return web.json_response(
            text=forged(keyring, "known", await request.json()).model_dump_json()
        )

    async def certificate(_: web.Request) -> web.StreamResponse:

        issued = keyring.ca.issue(
            subject("x"), new_key().public_key(), usages=[SERVER], lifetime=dt.timedelta(days=1)
        )
        pem = certificate_pem(issued).decode()
        return web.json_response(
            {"node": str(uuid.uuid4()), "certificate_pem": pem, "ca_pem": keyring.ca_pem}
        )

    async with serving(context, challenge, certificate) as url:
        with pytest.raises(ConfigError, match="not for its key"):
            await enrol(config_for(tmp_path, url), "known", NodeRole.MACHINE, name="web")
    assert not is_enrolled(str(tmp_path / "node"))


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_enrol_options(parser)
    return parser.parse_args(words)


async def test_the_command_enrols_and_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with open_control(tmp_path) as control:
        path = tmp_path / "passphrase"
        path.touch(0o600)
        path.write_text((await control.passphrase(NodeRole.APPLIER)).upper() + "\n")
        config = control.config("node")
        code = await asyncio.to_thread(
            enrol_command, options("--passphrase-file", str(path)), config, NodeRole.APPLIER
        )
        assert code == 0
        told = capsys.readouterr().out
        identity = load(config.identity_folder)
        assert str(identity.node) in told
        assert identity.name == socket.gethostname()


@pytest.mark.parametrize(
    ("words", "has_config", "told"),
    [
        (("--passphrase-file", "/nonexistent"), True, "no passphrase file"),
        ((), True, "--passphrase-file"),
        (("--passphrase-file", "-"), False, "no [control] section"),
    ],
)
def test_the_command_tells_what_is_missing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    has_config: bool,
    told: str,
) -> None:
    config = config_for(tmp_path, CLOSED) if has_config else None
    assert enrol_command(options(*words), config, NodeRole.APPLIER) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (b"secret", 0o644, "read by others"),
        (b" \n", 0o600, "no passphrase"),
        (b"\xff\xfe", 0o600, "no text"),
    ],
)
def test_a_bad_passphrase_file_is_told(
    tmp_path: Path, content: bytes, mode: int, told: str
) -> None:
    path = tmp_path / "passphrase"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=told):
        read_passphrase(str(path))

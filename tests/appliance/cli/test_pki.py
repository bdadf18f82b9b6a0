import json
import os
import ssl
import stat
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from appliance.cli.__main__ import main
from appliance.cli.authority import Authority, create_data_key
from replication.errors import ConfigError

MACHINE = uuid.UUID("6f1c1a0e-93a4-4c0e-9f57-0d4b8a1c2e3f")


def understudy(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "appliance.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def shake_hands(server: Path, client: Path, name: str) -> str:
    """A TLS handshake in memory; the common name that the server sees."""
    purposes = ((ssl.Purpose.CLIENT_AUTH, server), (ssl.Purpose.SERVER_AUTH, client))
    contexts = []
    for purpose, folder in purposes:
        context = ssl.create_default_context(purpose, cafile=str(folder / "ca.pem"))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        contexts.append(context)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server_side = contexts[0].wrap_bio(to_server, to_client, server_side=True)
    client_side = contexts[1].wrap_bio(to_client, to_server, server_hostname=name)
    for side in (client_side, server_side) * 2:
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    peer = server_side.getpeercert()
    assert peer is not None
    subject: Any = peer["subject"]
    return str(subject[0][0][1])


def test_machine_and_server_know_each_other_under_strict_checks(tmp_path: Path) -> None:
    Authority.create(str(tmp_path / "ca"))
    authority = Authority.open(str(tmp_path / "ca"))
    authority.issue_machine(MACHINE, str(tmp_path / "machine"))
    authority.issue_server(["ps.example", "127.0.0.1"], str(tmp_path / "server"))
    for name in ("ps.example", "127.0.0.1"):
        assert shake_hands(tmp_path / "server", tmp_path / "machine", name) == str(MACHINE)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path / "server", tmp_path / "machine", "other.example")


def test_machine_certificate_cannot_be_a_server(tmp_path: Path) -> None:
    Authority.create(str(tmp_path / "ca"))
    authority = Authority.open(str(tmp_path / "ca"))
    authority.issue_machine(MACHINE, str(tmp_path / "machine"))
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path / "machine", tmp_path / "machine", str(MACHINE))


def test_keys_are_private_and_nothing_is_overwritten(tmp_path: Path) -> None:
    ca, machine, data_key = (str(tmp_path / name) for name in ("ca", "machine", "data.key"))
    for _ in range(2):
        made = [
            understudy("pki", "init", ca),
            understudy("pki", "issue", ca, "--out", machine, "--machine", str(MACHINE)),
            understudy("pki", "data-key", data_key),
        ]
        keys = [Path(path).read_bytes() for path in (f"{ca}/key.pem", f"{machine}/key.pem")]
        if made[0].returncode == 0:
            first = keys
    assert [one.returncode for one in made] == [2, 2, 2]
    assert all("is not overwritten" in one.stderr for one in made)
    assert all("Traceback" not in one.stderr for one in made)
    assert keys == first
    for path in (f"{ca}/key.pem", f"{machine}/key.pem", data_key):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert len(bytes.fromhex(Path(data_key).read_text())) == 32
    assert sorted(os.listdir(machine)) == ["ca.pem", "certificate.pem", "key.pem"]


def test_output_is_json_on_request(tmp_path: Path) -> None:
    ca = str(tmp_path / "ca")
    assert json.loads(understudy("pki", "init", ca, "--json").stdout)["folder"] == ca
    out = str(tmp_path / "server")
    issued = understudy("pki", "issue", ca, "--out", out, "--server", "ps.example", "--json")
    assert json.loads(issued.stdout)["subject"] == "ps.example"
    pem = (tmp_path / "server" / "certificate.pem").read_bytes()
    certificate = x509.load_pem_x509_certificate(pem)
    expires = json.loads(issued.stdout)["expires"]
    assert expires == certificate.not_valid_after_utc.isoformat()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--machine", "web-01"), "is not a UUID"),
        ((), "say for whom"),
        (("--machine", str(MACHINE), "--server", "x"), "say for whom"),
        (("--server", "not a name"), "neither a DNS name nor an IP address"),
    ],
)
def test_bad_arguments_are_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    told: str,
) -> None:
    Authority.create(str(tmp_path / "ca"))
    out = str(tmp_path / "out")
    words = ["understudy", "pki", "issue", str(tmp_path / "ca"), "--out", out, *arguments]
    monkeypatch.setattr(sys, "argv", words)
    assert main() == 2
    assert told in capsys.readouterr().err
    assert not os.path.exists(out)


def test_missing_authority_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable certificate authority"):
        Authority.open(str(tmp_path))


def test_data_key_loses_no_race(tmp_path: Path) -> None:
    path = str(tmp_path / "data.key")
    create_data_key(path)
    content = Path(path).read_bytes()
    with pytest.raises(ConfigError, match="is not overwritten"):
        create_data_key(path)
    assert Path(path).read_bytes() == content
    assert os.listdir(tmp_path) == ["data.key"]

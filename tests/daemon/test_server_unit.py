"""Of the servers of one CA, only those of the right kind are spoken to."""

import contextlib
import datetime as dt
import socket
import ssl
import threading
from pathlib import Path

import pytest

from daemon.certificates import SERVER, Issuer, certificate_pem, key_pem, new_key, subject
from daemon.tls import CONFIG_SERVER_UNIT, demand_unit

DAY = dt.timedelta(days=1)


def contexts(folder: Path, unit: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Of a server whose certificate has ``unit``, and of a client that trusts its CA."""
    ca, key = Issuer.create("a test's CA", DAY), new_key()
    holder = subject("server", unit)
    own = ca.issue(holder, key.public_key(), usages=[SERVER], lifetime=DAY, names=["server"])
    pair = folder / "server.pem"
    pair.write_bytes(key_pem(key) + certificate_pem(own))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair)
    client = ssl.create_default_context(cadata=certificate_pem(ca.certificate).decode())
    return server, client


def talk_once(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """Shake hands over a socket pair, and hear a word."""
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with contextlib.suppress(OSError), server.wrap_socket(theirs, server_side=True) as channel:
            channel.sendall(b"welcome")
        theirs.close()

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        ours.settimeout(5)
        with client.wrap_socket(ours, server_hostname="server") as channel:
            assert channel.recv(100) == b"welcome"
    finally:
        ours.close()
        thread.join(10)


@pytest.mark.parametrize("unit", ["process-server", "applier", "", "Config-Server"])
def test_a_server_of_another_kind_is_refused(tmp_path: Path, unit: str) -> None:
    server, client = contexts(tmp_path, unit)
    talk_once(server, client)
    demand_unit(client, CONFIG_SERVER_UNIT)
    with pytest.raises(ssl.SSLCertVerificationError, match="not that of a config server"):
        talk_once(server, client)


def test_a_server_of_the_right_kind_is_spoken_to(tmp_path: Path) -> None:
    server, client = contexts(tmp_path, CONFIG_SERVER_UNIT)
    demand_unit(client, CONFIG_SERVER_UNIT)
    talk_once(server, client)

"""The command line gives its token to the config server, and to no other server of its CA."""

import datetime as dt
import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from appliance.cli.api_client import ApiClient
from appliance.cli.sign_in import SignIn
from daemon.certificates import CLIENT, SERVER, Issuer, certificate_pem, key_pem, new_key, subject
from daemon.tls import CONFIG_SERVER_UNIT
from replication.control.role import NodeRole
from replication.errors import PeerError

DAY = dt.timedelta(days=1)


@contextmanager
def serving(folder: Path, unit: str) -> Iterator[tuple[SignIn, list[str]]]:
    """A server with a certificate of ``unit`` that is signed in to, and the tokens it is sent."""
    ca, key, tokens = Issuer.create("a test's CA", DAY), new_key(), list[str]()
    own = ca.issue(
        subject("x", unit), key.public_key(), usages=[SERVER, CLIENT], lifetime=DAY,
        names=["localhost"],
    )  # fmt: skip
    pair = folder / "server.pem"
    pair.write_bytes(key_pem(key) + certificate_pem(own))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            tokens.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            url = f"https://localhost:{server.server_address[1]}"
            ca_pem = certificate_pem(ca.certificate).decode()
            yield SignIn(url=url, token="secret", ca_pem=ca_pem), tokens
        finally:
            server.shutdown()
            thread.join(10)


def test_a_process_server_that_poses_as_the_config_server_gets_no_token(tmp_path: Path) -> None:
    with serving(tmp_path, NodeRole.PROCESS_SERVER) as (sign_in, tokens):
        with ApiClient(sign_in) as api, pytest.raises(PeerError, match="cannot be trusted") as told:
            api.get("/me")
        assert "not that of a config server" in str(told.value)
        assert tokens == []


def test_the_config_server_gets_it(tmp_path: Path) -> None:
    with serving(tmp_path, CONFIG_SERVER_UNIT) as (sign_in, tokens):
        with ApiClient(sign_in) as api:
            assert api.get("/me") == {}
        assert tokens == ["Bearer secret"]

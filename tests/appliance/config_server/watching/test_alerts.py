"""Alert e-mail against a real SMTP server: once each, also over restarts and outages."""

import asyncio
import datetime as dt
import ipaddress
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import ValidationError
from sqlalchemy import select
from structlog.testing import capture_logs

from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import Event
from appliance.config_server.watching.alerts import (
    HEALTH_PART,
    MAILED_WITHIN_SECONDS,
    AlertMailer,
)
from appliance.config_server.watching.config import SmtpConfig, WatchingConfig
from appliance.config_server.watching.mail import LISTED_MAX
from appliance.config_server.watching.smtp import check
from appliance.config_server.watching.watcher import Watcher
from daemon.service import Health
from replication.errors import ConfigError, UnavailableError

NS = 1_000_000_000
PASSWORD = "correct horse battery"


@dataclass
class Mailbox:
    """What the server took; ``refusing``: what it answers instead."""

    messages: list[EmailMessage] = field(default_factory=list)
    refusing: str = ""

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        if self.refusing:
            return self.refusing
        self.messages.append(message_from_bytes(envelope.content, policy=policy.SMTP))
        return "250 taken"

    def subjects(self) -> list[str]:
        return [str(one["Subject"]) for one in self.messages]

    def text(self, index: int = -1) -> str:
        return str(self.messages[index].get_content())


class Server:
    """An SMTP server on a free port of 127.0.0.1."""

    def __init__(self, **options: Any) -> None:
        self.mailbox = Mailbox()
        self._options = options
        self.port = 0
        self.start()

    def start(self) -> None:
        # Port 0 would have the controller look for itself at port 0.
        self._controller = _FreePort(
            self.mailbox, hostname="127.0.0.1", port=self.port, **self._options
        )
        self._controller.start()
        self.port = self._controller.bound_port

    def stop(self) -> None:
        self._controller.stop()


class _FreePort(Controller):
    bound_port = 0

    def _trigger_server(self) -> None:
        server: Any = self.server
        self.port = self.bound_port = server.sockets[0].getsockname()[1]
        super()._trigger_server()  # type: ignore[no-untyped-call]


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.stop()


@pytest.fixture
async def database(tmp_path: Path) -> Any:
    async with open_database(f"sqlite+aiosqlite:///{tmp_path}/db") as opened:
        yield opened


def config(server: Server, **changes: Any) -> SmtpConfig:
    tree: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": server.port,
        "tls": "none",
        "sender": "understudy@example.net",
        "to": ["ops@example.net", "night@example.net"],
        "timeout_seconds": 5,
    }
    return SmtpConfig.model_validate(tree | changes)


async def mailer(database: Database, smtp: SmtpConfig, health: Health | None = None) -> AlertMailer:
    """One that watches, as after a start."""
    watcher = Watcher(database, WatchingConfig(settle_seconds=0), Health())
    async with database.writing() as session:
        await session.execute(select(Event))
    await watcher.look()
    return AlertMailer(database, smtp, watcher, health or Health())


async def add(database: Database, count: int = 1, **changes: Any) -> None:
    async with database.writing() as session:
        for _ in range(count):
            fields: dict[str, Any] = {
                "at_ns": time.time_ns(),
                "code": "node-silent",
                "severity": "critical",
                "source": "ps-1",
                "message": "nothing heard of it for 16 min",
                "cause": "its host is down",
                "action": "look at it",
            }
            session.add(Event(**(fields | changes)))


async def test_a_critical_event_is_mailed_once(database: Database, server: Server) -> None:
    await add(database)
    await add(database, severity="warning", message="merely a warning")
    sender = await mailer(database, config(server))
    assert await sender.send_due() == 1
    assert await sender.send_due() == 0
    (message,) = server.mailbox.messages
    assert server.mailbox.subjects() == [
        "[Understudy] CRITICAL ps-1: nothing heard of it for 16 min"
    ]
    assert message["From"] == "understudy@example.net"
    assert message["To"] == "ops@example.net, night@example.net"
    assert message["Message-ID"].endswith("@example.net>")
    assert message["Auto-Submitted"] == "auto-generated"
    for told in ("its host is down", "look at it", "since "):
        assert told in server.mailbox.text()
    assert "merely" not in server.mailbox.text()


async def test_warnings_are_mailed_where_they_are_wanted(
    database: Database, server: Server
) -> None:
    await add(database, severity="warning")
    sender = await mailer(database, config(server, min_severity="warning"))
    assert await sender.send_due() == 1


async def test_many_events_are_one_digest(database: Database, server: Server) -> None:
    await add(database, LISTED_MAX + 7)
    sender = await mailer(database, config(server))
    assert await sender.send_due() == LISTED_MAX + 7
    assert await sender.send_due() == 0
    assert server.mailbox.subjects() == ["[Understudy] 107 events, 100 or more critical"]
    assert server.mailbox.text().count("CRITICAL  ps-1") == LISTED_MAX
    assert "And 7 more." in server.mailbox.text()


async def test_after_a_restart_nothing_is_mailed_twice_and_nothing_is_lost(
    database: Database, server: Server
) -> None:
    await add(database)
    first = await mailer(database, config(server))
    await first.send_due()
    await first._watcher._give_up()
    await add(database, message="the second")
    second = await mailer(database, config(server))
    assert await second.send_due() == 1
    assert len(server.mailbox.messages) == 2
    assert "the second" in server.mailbox.text()


async def test_killed_before_it_could_note_it_repeats_the_same_message(
    database: Database, server: Server
) -> None:
    await add(database, 3)
    sender = await mailer(database, config(server))
    await sender.send_due()
    async with database.writing() as session:
        for row in await session.scalars(select(Event)):
            row.mailed_ns = None
    await sender.send_due()
    first, second = server.mailbox.messages
    assert first["Message-ID"] == second["Message-ID"]


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 - the daemon's own health has no event
        await asyncio.sleep(0.02)


async def test_server_away_keeps_the_event_until_it_is_back(
    database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.config_server.watching.alerts.RETRY_SECONDS_FIRST", 0.1)
    server.stop()
    await add(database)
    health = Health()
    sender = await mailer(database, config(server), health)
    with pytest.raises(UnavailableError, match="did not take an alert"):
        await sender.send_due()
    task = asyncio.create_task(sender.run())
    try:
        async with asyncio.timeout(10):
            await until(lambda: HEALTH_PART in health.warnings)
            server.start()
            await until(lambda: bool(server.mailbox.messages) and not health.warnings)
    finally:
        task.cancel()
    assert len(server.mailbox.messages) == 1
    assert sender.failed_count >= 1


@pytest.mark.parametrize("answer", ["451 later", "554 no, never"])
async def test_a_refusal_keeps_the_event(database: Database, server: Server, answer: str) -> None:
    server.mailbox.refusing = answer
    await add(database)
    sender = await mailer(database, config(server))
    with pytest.raises(UnavailableError, match=answer[4:]):
        await sender.send_due()
    server.mailbox.refusing = ""
    assert await sender.send_due() == 1


async def test_old_events_are_no_news(database: Database, server: Server) -> None:
    await add(database, at_ns=time.time_ns() - (MAILED_WITHIN_SECONDS + 5) * NS)
    assert await (await mailer(database, config(server))).send_due() == 0


async def test_only_who_watches_mails(database: Database, server: Server) -> None:
    await add(database)
    first = await mailer(database, config(server))
    second = await mailer(database, config(server))
    assert await second.send_due() == 0
    assert await first.send_due() == 1


HOSTILE = "x\r\nBcc: evil@example.org\r\n\r\nbody \u2028 \x1b[2J"


async def test_names_and_reasons_cannot_add_headers(database: Database, server: Server) -> None:
    await add(database, source=HOSTILE, message=HOSTILE, cause=HOSTILE, action=HOSTILE)
    sender = await mailer(database, config(server))
    assert await sender.send_due() == 1
    (message,) = server.mailbox.messages
    assert message["Bcc"] is None
    assert "\n" not in server.mailbox.subjects()[0]
    assert not [line for line in server.mailbox.text().splitlines() if line.startswith("Bcc")]


async def test_names_beyond_ascii_arrive(database: Database, server: Server) -> None:
    await add(database, source="größe-01", message="läuft nicht")
    sender = await mailer(database, config(server))
    await sender.send_due()
    assert server.mailbox.subjects() == ["[Understudy] CRITICAL größe-01: läuft nicht"]
    assert "größe-01" in server.mailbox.text()


def certificate(folder: Path) -> ssl.SSLContext:
    """A server's context; its certificate, in ``folder``, is its own CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "smtp")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "smtp.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "smtp.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "smtp.pem", folder / "smtp.key")
    return context


def authenticate(_server: Any, _session: Any, _envelope: Any, _how: str, data: Any) -> Any:
    good = data == LoginPassword(b"understudy", PASSWORD.encode())
    return AuthResult(success=good, handled=False)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    """A server that wants STARTTLS and a password."""
    found = Server(
        tls_context=certificate(tmp_path),
        require_starttls=True,
        authenticator=authenticate,
        auth_required=True,
    )
    yield found
    found.stop()


def password_file(folder: Path, content: str = PASSWORD, mode: int = 0o600) -> str:
    path = folder / "smtp.password"
    path.write_text(content + "\n")
    path.chmod(mode)
    return str(path)


async def test_starttls_with_a_password(
    database: Database, guarded: Server, tmp_path: Path
) -> None:
    await add(database)
    options = {"tls": "starttls", "ca": str(tmp_path / "smtp.pem"), "user": "understudy"}
    smtp = config(guarded, password_file=password_file(tmp_path), **options)
    assert await (await mailer(database, smtp)).send_due() == 1


async def test_a_wrong_password_is_told_without_telling_it(
    database: Database, guarded: Server, tmp_path: Path
) -> None:
    await add(database)
    smtp = config(
        guarded,
        tls="starttls",
        ca=str(tmp_path / "smtp.pem"),
        user="understudy",
        password_file=password_file(tmp_path, "wrong secret"),
    )
    with pytest.raises(UnavailableError) as caught:
        await (await mailer(database, smtp)).send_due()
    assert "wrong secret" not in str(caught.value)


async def test_an_unknown_certificate_gets_no_mail(
    database: Database, guarded: Server, tmp_path: Path
) -> None:
    await add(database)
    smtp = config(guarded, tls="starttls", user="understudy", password_file=password_file(tmp_path))
    with pytest.raises(UnavailableError, match=r"(?i)certificate"):
        await (await mailer(database, smtp)).send_due()
    assert guarded.mailbox.messages == []


async def test_tls_is_not_given_up_where_the_server_has_none(
    database: Database, server: Server
) -> None:
    await add(database)
    with pytest.raises(UnavailableError, match=r"(?i)starttls"):
        await (await mailer(database, config(server, tls="starttls"))).send_due()
    assert server.mailbox.messages == []


async def test_tls_from_the_first_byte(database: Database, tmp_path: Path) -> None:
    server = Server(ssl_context=certificate(tmp_path))
    try:
        await add(database)
        smtp = config(server, tls="tls", ca=str(tmp_path / "smtp.pem"))
        assert await (await mailer(database, smtp)).send_due() == 1
    finally:
        server.stop()


def test_password_files_that_others_can_read_are_refused(server: Server, tmp_path: Path) -> None:
    for content, mode, told in ((PASSWORD, 0o644, "read by others"), ("", 0o600, "is empty")):
        smtp = config(
            server,
            tls="starttls",
            user="understudy",
            password_file=password_file(tmp_path, content, mode),
        )
        with pytest.raises(ConfigError, match=told):
            check(smtp)
    with pytest.raises(ConfigError, match=r"smtp\.ca"):
        check(config(server, tls="tls", ca=str(tmp_path / "none.pem")))


@pytest.mark.parametrize(
    "changes",
    [
        {"to": []},
        {"sender": ""},
        {"sender": "a@b\r\nBcc: c@d"},
        {"to": ["a@b, c@d"]},
        {"to": ["nobody"]},
        {"user": "u"},
        {"user": "u", "password_file": "p", "tls": "none"},
        {"host": "a b"},
        {"port": 0},
    ],
)
def test_a_senseless_section_is_refused(changes: dict[str, Any], server: Server) -> None:
    with pytest.raises(ValidationError):
        config(server, **changes)


async def test_without_a_host_nothing_runs(database: Database) -> None:
    await add(database)
    await (await mailer(database, SmtpConfig())).run()


async def test_a_defect_in_mailing_is_told_and_the_next_try_mails(
    database: Database, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.config_server.watching.alerts.RETRY_SECONDS_FIRST", 0.1)
    await add(database)
    health = Health()
    sender = await mailer(database, config(server), health)
    mail = sender.send_due

    async def broken() -> int:
        monkeypatch.setattr(sender, "send_due", mail)
        raise KeyError("machine")

    monkeypatch.setattr(sender, "send_due", broken)
    with capture_logs() as logs:
        task = asyncio.create_task(sender.run())
        try:
            async with asyncio.timeout(10):
                await until(lambda: "KeyError('machine')" in health.warnings.get(HEALTH_PART, ""))
                await until(lambda: bool(server.mailbox.messages) and not health.warnings)
        finally:
            task.cancel()
    assert [log["event"] for log in logs].count("mailing has a defect") == 1

"""Alerts as e-mail messages. Pure.

Names and reasons come from machines that others may own: they go through `clean`, and the headers
through the standard library's, which refuse line ends.

Source: RFC 5322.
"""

import datetime as dt
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP

from appliance.config_server.watching.reason import Severity, clean
from appliance.config_server.watching.rpo import NS

LISTED_MAX = 100
_SUBJECT_CHARS_MAX = 200


@dataclass(frozen=True, slots=True)
class Alert:
    """An event as an e-mail tells it."""

    id: int
    at_ns: int
    severity: Severity
    source: str
    message: str
    cause: str
    action: str
    cleared_ns: int | None = None


def compose(
    alerts: Sequence[Alert], more_count: int, *, sender: str, to: Sequence[str], now_ns: int
) -> EmailMessage:
    """One e-mail of one or many alerts; ``more_count``: as many again are not listed.

    The same alerts make the same Message-ID: one that is sent twice, because we were killed before
    we could note it, is shown once by whoever looks at that.
    """
    assert alerts
    message = EmailMessage(policy=SMTP)
    message["Subject"] = _subject(alerts, more_count)
    message["From"] = sender
    message["To"] = ", ".join(to)
    message["Date"] = dt.datetime.fromtimestamp(now_ns // NS, dt.UTC)
    message["Message-ID"] = f"<{_digest(alerts)}@{sender.rpartition('@')[2]}>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content("\n\n".join(_body(alerts, more_count)) + "\n", cte="quoted-printable")
    return message


def _subject(alerts: Sequence[Alert], more_count: int) -> str:
    if len(alerts) == 1 and not more_count:
        alert = alerts[0]
        told = f"{alert.severity.upper()} {alert.source}: {alert.message}"
    else:
        critical = sum(alert.severity is Severity.CRITICAL for alert in alerts)
        sources = len({alert.source for alert in alerts})
        told = f"{len(alerts) + more_count} events at {sources} sources, {critical} critical"
        if more_count:
            told = f"{len(alerts) + more_count} events, {critical} or more critical"
    return clean(f"[Understudy] {told}")[:_SUBJECT_CHARS_MAX]


def _body(alerts: Sequence[Alert], more_count: int) -> list[str]:
    paragraphs = [
        "\n".join(
            (
                f"{alert.severity.upper()}  {clean(alert.source)}",
                f"  {clean(alert.message)}",
                f"  since   {_instant(alert.at_ns)}{_cleared(alert)}",
                f"  cause   {clean(alert.cause)}",
                f"  action  {clean(alert.action)}",
                f"  event   {alert.id}",
            )
        )
        for alert in alerts
    ]
    if more_count:
        paragraphs.append(f"And {more_count} more. `understudy events --open` lists them.")
    return paragraphs


def _cleared(alert: Alert) -> str:
    return f", over since {_instant(alert.cleared_ns)}" if alert.cleared_ns else ""


def _instant(time_ns: int) -> str:
    return f"{dt.datetime.fromtimestamp(time_ns // NS, dt.UTC):%Y-%m-%d %H:%M:%S} UTC"


def _digest(alerts: Sequence[Alert]) -> str:
    named = ",".join(f"{alert.id}:{alert.at_ns}" for alert in alerts)
    return f"understudy-{hashlib.sha256(named.encode()).hexdigest()[:32]}"

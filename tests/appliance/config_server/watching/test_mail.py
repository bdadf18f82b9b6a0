"""Messages are well formed, whatever nodes call themselves."""

from email import message_from_bytes, policy

from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.watching.mail import Alert, compose
from appliance.config_server.watching.reason import Severity

TEXT = st.text(max_size=300)
ALERTS = st.lists(
    st.builds(
        Alert,
        id=st.integers(1, 10**9),
        at_ns=st.integers(0, 2 * 10**18),
        severity=st.sampled_from(Severity),
        source=TEXT,
        message=TEXT,
        cause=TEXT,
        action=TEXT,
        cleared_ns=st.none() | st.integers(1, 2 * 10**18),
    ),
    min_size=1,
    max_size=4,
)
HEADERS = {
    "Subject", "From", "To", "Date", "Message-ID", "Auto-Submitted",
    "Content-Type", "Content-Transfer-Encoding", "MIME-Version",
}  # fmt: skip


@given(alerts=ALERTS, more=st.integers(0, 50))
def test_no_text_adds_a_header_or_breaks_the_message(alerts: list[Alert], more: int) -> None:
    message = compose(
        alerts, more, sender="u@example.net", to=["a@example.net", "b@example.net"], now_ns=10**18
    )
    read = message_from_bytes(message.as_bytes(), policy=policy.SMTP)
    assert set(read.keys()) == HEADERS
    assert len(read.keys()) == len(HEADERS)
    assert not read.defects
    assert str(read["To"]) == "a@example.net, b@example.net"
    assert str(read["Subject"]).startswith("[Understudy] ")
    assert all(line.isascii() and len(line) < 998 for line in message.as_bytes().splitlines())
    assert str(read.get_content()).count("  event   ") == len(alerts)


@given(alerts=ALERTS)
def test_the_same_alerts_have_the_same_identity(alerts: list[Alert]) -> None:
    first = compose(alerts, 0, sender="u@example.net", to=["a@example.net"], now_ns=1)
    second = compose(alerts, 0, sender="u@example.net", to=["a@example.net"], now_ns=10**18)
    assert first["Message-ID"] == second["Message-ID"]
    assert first["Date"] != second["Date"]

import ssl
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyVmomi import vim

from appliance.config_server.discovery.reader import (
    BACKOFF_SECONDS_MAX,
    BACKOFF_SECONDS_MIN,
    JITTER_SHARE,
    backoff_seconds,
    explain,
)
from appliance.config_server.discovery.target import Target, Verify, parse_url, tls_context
from replication.errors import InputError

Random = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 10_000), Random)
def test_waiting_grows_to_a_bound_and_is_never_nothing(failures: int, share: float) -> None:
    seconds = backoff_seconds(failures, lambda: share)
    assert BACKOFF_SECONDS_MIN * (1 - JITTER_SHARE) <= seconds <= BACKOFF_SECONDS_MAX
    assert backoff_seconds(failures + 2, lambda: share) >= seconds


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (vim.fault.InvalidLogin(msg="secret"), "user or password is wrong"),  # type: ignore[no-untyped-call]
        (vim.fault.NoPermission(), "may not read"),  # type: ignore[no-untyped-call]
        (vim.fault.HostConnectFault(msg="why"), "HostConnectFault: why"),  # type: ignore[no-untyped-call]
        (TimeoutError(), "no answer within 30 s"),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (ssl.SSLError(1, "bad record"), "TLS fails"),
        (ValueError("x" * 9000), "ValueError"),
    ],
)
def test_trouble_is_told_in_words(error: Exception, words: str) -> None:
    assert words in explain(error)
    assert len(explain(error)) <= 500


def test_target_hides_its_password() -> None:
    target = Target(
        uuid.uuid4(), "east", "https://x", "user", "secret", Verify.CA, "pem", revision=1
    )
    assert "secret" not in repr(target)


def test_address_has_the_usual_port_and_path() -> None:
    told = parse_url("https://vcenter.example.com/")
    assert (told.host, told.port, told.path) == ("vcenter.example.com", 443, "/sdk")
    told = parse_url("https://[2001:db8::1]:8443/other/sdk")
    assert (told.host, told.port, told.path) == ("2001:db8::1", 8443, "/other/sdk")


@given(st.text(max_size=40))
def test_address_is_taken_or_refused_in_words(text: str) -> None:
    for url in (text, f"https://{text}"):
        refusal = None
        try:
            assert parse_url(url).host
        except InputError as error:
            refusal = error
        assert refusal is None or refusal.hint


def test_only_what_the_operator_says_is_unchecked() -> None:
    assert tls_context(Verify.CA, "").verify_mode is ssl.CERT_REQUIRED
    assert tls_context(Verify.CA, "").check_hostname
    assert tls_context(Verify.NONE, "").verify_mode is ssl.CERT_NONE
    for pem in ("", " ", "nonsense"):
        with pytest.raises(InputError):
            tls_context(Verify.PINNED, pem)
    with pytest.raises(InputError):
        tls_context(Verify.CA, "nonsense")

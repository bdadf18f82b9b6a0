import datetime as dt
import ssl

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from daemon.certificates import (
    CLIENT,
    SERVER,
    Issuer,
    SigningRequest,
    alternative_name,
    certificate_pem,
    key_digest,
    key_pem,
    name_part,
    names_of,
    new_key,
    read_certificate,
    read_key,
    serial_text,
    signing_request,
    subject,
    utc_now,
)
from replication.errors import ConfigError, PeerError

ISSUER = Issuer.create("test CA", dt.timedelta(days=10))
DAY = dt.timedelta(days=1)


def test_a_certificate_names_its_holder_and_what_it_is() -> None:
    key = new_key()
    certificate = ISSUER.issue(
        subject("web", "machine"), key.public_key(), usages=[CLIENT], lifetime=DAY
    )
    assert name_part(certificate.subject, NameOID.COMMON_NAME) == "web"
    assert name_part(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME) == "machine"
    assert names_of(certificate) == ()
    assert certificate.public_key() == key.public_key()
    certificate.verify_directly_issued_by(ISSUER.certificate)
    assert read_certificate(certificate_pem(certificate)) == certificate


def test_no_certificate_outlives_its_ca() -> None:
    certificate = ISSUER.issue(
        subject("x"), new_key().public_key(), usages=[SERVER], lifetime=DAY * 99, names=["a.b"]
    )
    assert certificate.not_valid_after_utc == ISSUER.certificate.not_valid_after_utc
    assert certificate.not_valid_before_utc <= utc_now() - dt.timedelta(minutes=59)


def test_a_request_gives_its_key_and_nothing_else() -> None:
    key = new_key()
    request = SigningRequest.read(signing_request(key, "whoever").decode())
    assert key_digest(request.public_key) == key_digest(key.public_key())
    assert key_digest(new_key().public_key()) != key_digest(key.public_key())


def test_requests_and_keys_of_other_kinds_are_refused() -> None:
    with pytest.raises(PeerError, match="no certificate signing request"):
        SigningRequest.read("hello")
    with pytest.raises(PeerError, match="no certificate"):
        read_certificate("hello")
    with pytest.raises(ConfigError, match="here holds no private key"):
        read_key(b"hello", "here")
    other = rsa.generate_private_key(65537, 2048)
    with pytest.raises(ConfigError, match="elliptic-curve"):
        read_key(key_pem(other), "here")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a.example", True),
        ("192.0.2.1", True),
        ("2001:db8::1", True),
        ("under_score.example", True),
        ("", False),
        ("*.example", False),
        ("a b", False),
        ("a..b", False),
        ("ä.example", False),
        ("x" * 64, False),
        (("x" * 63 + ".") * 4 + "x", False),
    ],
)
def test_alternative_names_are_dns_names_or_addresses(name: str, good: bool) -> None:
    if good:
        assert str(alternative_name(name).value) == name
    else:
        with pytest.raises(ConfigError):
            alternative_name(name)


def test_a_serial_number_has_one_written_form() -> None:
    assert serial_text(0x0ABC) == serial_text("0ABC") == serial_text("abc") == "abc"
    pem = certificate_pem(ISSUER.certificate).decode()
    context = ssl.create_default_context(cadata=pem)
    told = context.get_ca_certs()[-1]["serialNumber"]
    assert serial_text(str(told)) == serial_text(ISSUER.certificate.serial_number)

"""X.509 as all parts make it: elliptic curve P-256, SHA-256, one CA without intermediates.

A certificate's common name says who its holder is; the organizational unit, where there is one,
what it is. Nothing of a signing request but its key is taken over.

Source: RFC 5280 (certificates), RFC 2986 (signing requests).
"""

import datetime as dt
import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from replication.errors import ConfigError, PeerError

CLOCK_SKEW = dt.timedelta(hours=1)
"""So much earlier a certificate begins to be good: for a node whose clock is behind."""

COMMON_NAME_CHARS_MAX = 64
CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True, slots=True)
class Issuer:
    """A CA: its certificate and the key that signs others."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, common_name: str, lifetime: dt.timedelta) -> "Issuer":
        """A new CA that trusts itself."""
        key = new_key()
        name = subject(common_name)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = (
            _builder(name, name, key.public_key(), utc_now() + lifetime)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(identifier, critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(certificate, key)

    def issue(
        self,
        holder: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        *,
        usages: Sequence[x509.ObjectIdentifier],
        lifetime: dt.timedelta,
        names: Sequence[str] = (),
    ) -> x509.Certificate:
        """A certificate for ``holder``, never good for longer than the CA itself.

        names: DNS names and addresses of a server; ConfigError when one is neither.
        """
        alternatives = [alternative_name(name) for name in names]
        expires = min(utc_now() + lifetime, self.certificate.not_valid_after_utc)
        own = x509.SubjectKeyIdentifier.from_public_key(public_key)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = (
            _builder(holder, self.certificate.subject, public_key, expires)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(own, critical=False)
            .add_extension(issuer, critical=False)
        )
        if alternatives:
            builder = builder.add_extension(
                x509.SubjectAlternativeName(alternatives), critical=False
            )
        return builder.sign(self.key, hashes.SHA256())


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def subject(common_name: str, unit: str = "") -> x509.Name:
    """A name of a holder; ``unit`` is its role."""
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
    if unit:
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name(attributes)


def alternative_name(name: str) -> x509.GeneralName:
    """A DNS name or an address as certificates hold it; ConfigError when it is neither."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    labels = name.split(".")
    if not name.isascii() or len(name) > 253 or not all(_is_label(label) for label in labels):
        raise ConfigError(f"{name!r:.300} is neither a DNS name nor an IP address")
    return x509.DNSName(name)


def _is_label(label: str) -> bool:
    return 0 < len(label) <= 63 and label.replace("-", "").replace("_", "").isalnum()


def signing_request(key: ec.EllipticCurvePrivateKey, common_name: str) -> bytes:
    """PEM of a request for ``key``. Who signs it decides what the certificate says."""
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject(common_name))
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


@dataclass(frozen=True, slots=True)
class SigningRequest:
    """A signing request whose signature is right.

    der: the whole of it, as a proof binds it.
    """

    public_key: ec.EllipticCurvePublicKey
    der: bytes

    @classmethod
    def read(cls, pem: str) -> "SigningRequest":
        """Raise PeerError unless it is one for a P-256 key, signed by that key."""
        try:
            request = x509.load_pem_x509_csr(pem.encode())
            key = request.public_key()
            signed = request.is_signature_valid
        except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
            raise PeerError(f"this is no certificate signing request: {error}") from error
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != ec.SECP256R1.name:
            raise PeerError("a signing request for a key on the curve P-256 was expected")
        if not signed:
            raise PeerError("the signing request is not signed by its own key")
        return cls(key, request.public_bytes(serialization.Encoding.DER))


def key_digest(public_key: ec.EllipticCurvePublicKey) -> str:
    """By which two certificates are seen to hold the same key: 64 hexadecimal digits."""
    return hashlib.sha256(
        public_key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    ).hexdigest()


def serial_text(serial: int | str) -> str:
    """A serial number in its one written form: hexadecimal, lower case, no leading zeros.

    Takes a number, or hexadecimal as ``ssl`` tells it (``getpeercert()["serialNumber"]``).
    """
    return f"{int(serial, 16) if isinstance(serial, str) else serial:x}"


def name_part(name: x509.Name, oid: x509.ObjectIdentifier) -> str:
    """The one value of ``oid`` in ``name``; empty when there is not exactly one."""
    found = [str(attribute.value) for attribute in name.get_attributes_for_oid(oid)]
    return found[0] if len(found) == 1 else ""


def names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """DNS names and addresses that a certificate is for."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in extension.value)


def read_certificate(pem: bytes | str) -> x509.Certificate:
    """Raise PeerError when it is none."""
    try:
        return x509.load_pem_x509_certificate(pem if isinstance(pem, bytes) else pem.encode())
    except ValueError as error:
        raise PeerError(f"this is no certificate: {error}") from error


def certificate_der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Not encrypted: for a file that is its owner's alone, or to be sealed."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def read_key(pem: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """Raise ConfigError that names ``where`` when it is no private key on an elliptic curve."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{where} holds no private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{where}: an elliptic-curve key was expected")
    return key


def utc_now() -> dt.datetime:
    """Now, to the second, as certificates tell time."""
    return dt.datetime.now(dt.UTC).replace(microsecond=0)


def _builder(
    holder: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    expires: dt.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(holder)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc_now() - CLOCK_SKEW)
        .not_valid_after(expires)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )

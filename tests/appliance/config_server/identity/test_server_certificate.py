import datetime as dt
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509

from appliance.config_server.identity.keyring import Keyring
from appliance.config_server.identity.server_certificate import SERVER_FILE, ServerCertificate
from daemon.certificates import names_of, read_certificate
from replication.errors import ConfigError

KEYRING = Keyring.create()
NAMES = ("config.example", "localhost", "127.0.0.1")
LIFETIME = dt.timedelta(days=90)


def made(folder: Path, names: tuple[str, ...] = NAMES, **changes: object) -> x509.Certificate:
    options: dict[str, object] = {"keyring": KEYRING, "lifetime": LIFETIME, **changes}
    ServerCertificate(folder=str(folder), names=names, **options)  # type: ignore[arg-type]
    return read_certificate((folder / SERVER_FILE).read_bytes())


def test_it_is_for_its_names_and_its_key_is_sealed(tmp_path: Path) -> None:
    certificate = made(tmp_path)
    assert names_of(certificate) == NAMES
    content = (tmp_path / SERVER_FILE).read_bytes()
    assert b"ENCRYPTED PRIVATE KEY" in content
    assert stat.S_IMODE(os.stat(tmp_path / SERVER_FILE).st_mode) == 0o600


def test_it_is_kept_while_it_fits(tmp_path: Path) -> None:
    assert made(tmp_path) == made(tmp_path)


def test_it_is_made_anew_for_other_names_another_ca_or_when_it_is_old(tmp_path: Path) -> None:
    first = made(tmp_path)
    second = made(tmp_path, ("other.example",))
    assert names_of(second) == ("other.example",)
    third = made(tmp_path, ("other.example",), keyring=Keyring.create())
    assert len({first, second, third}) == 3
    certificate = ServerCertificate(KEYRING, str(tmp_path), NAMES, dt.timedelta(seconds=0))
    assert certificate.renew_if_due()


@pytest.mark.parametrize("damage", [b"", b"no certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_damage_heals(tmp_path: Path, damage: bytes) -> None:
    made(tmp_path)
    (tmp_path / SERVER_FILE).write_bytes(damage)
    assert names_of(made(tmp_path)) == NAMES


def test_a_name_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name"):
        made(tmp_path, ("not a name",))


def test_it_ends_with_its_ca_at_the_latest(tmp_path: Path) -> None:
    certificate = made(tmp_path, lifetime=dt.timedelta(days=365 * 30))
    assert certificate.not_valid_after_utc == KEYRING.ca.certificate.not_valid_after_utc

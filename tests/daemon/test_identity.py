"""The identity folder: whole at any moment, private, and never mistaken for another's."""

import datetime as dt
import itertools
import multiprocessing
import os
import signal
import ssl
import stat
import sys
import uuid
from pathlib import Path

import pytest
from cryptography import x509

from daemon.certificates import CLIENT, Issuer, new_key, serial_text, subject
from daemon.identity import (
    CA_FILE,
    NODE_FILE,
    PAIR_FILE,
    PENDING_KEY_FILE,
    NodeRecord,
    choose_record,
    load,
    pending_key,
    take_certificate,
)
from daemon.tls import client_context
from replication.control.role import NodeRole
from replication.errors import ConfigError

ISSUER = Issuer.create("test CA", dt.timedelta(days=365))
RECORD = NodeRecord(id=uuid.UUID(int=5), role=NodeRole.APPLIER, name="applier-1")


def issued(folder: Path, record: NodeRecord = RECORD, *, days: float = 90) -> x509.Certificate:
    return ISSUER.issue(
        subject(str(record.id), record.role),
        pending_key(str(folder)).public_key(),
        usages=[CLIENT],
        lifetime=dt.timedelta(days=days),
    )


def enrolled(folder: Path, *, days: float = 90) -> x509.Certificate:
    choose_record(str(folder), RECORD)
    certificate = issued(folder, days=days)
    take_certificate(str(folder), RECORD, certificate, ISSUER.certificate)
    return certificate


def test_a_node_is_who_it_enrolled_as(tmp_path: Path) -> None:
    certificate = enrolled(tmp_path)
    identity = load(str(tmp_path))
    assert (identity.node, identity.role, identity.name) == (RECORD.id, RECORD.role, RECORD.name)
    assert identity.serial == serial_text(certificate.serial_number)
    assert not identity.is_expired
    life = identity.renewal_due - certificate.not_valid_before_utc - dt.timedelta(hours=1)
    assert abs(life - dt.timedelta(days=60)) < dt.timedelta(seconds=2)
    context = client_context(identity.tls)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert sorted(os.listdir(tmp_path)) == [CA_FILE, NODE_FILE, PAIR_FILE]
    for name in os.listdir(tmp_path):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_an_empty_folder_tells_how_to_enrol(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="nobody is enrolled") as caught:
            load(str(folder))
        assert "enrol --passphrase-file" in str(caught.value.hint)
    choose_record(str(tmp_path), RECORD)
    with pytest.raises(ConfigError, match="nobody is enrolled"):
        load(str(tmp_path))


def test_files_that_others_can_read_are_refused(tmp_path: Path) -> None:
    enrolled(tmp_path)
    (tmp_path / PAIR_FILE).chmod(0o640)
    with pytest.raises(ConfigError, match="read by others"):
        load(str(tmp_path))


@pytest.mark.parametrize("name", [NODE_FILE, PAIR_FILE])
@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xfe"])
def test_damage_is_told(tmp_path: Path, name: str, content: bytes) -> None:
    enrolled(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError):
        load(str(tmp_path))


def test_a_certificate_for_another_key_node_or_ca_is_not_taken(tmp_path: Path) -> None:
    before = enrolled(tmp_path)
    folder = str(tmp_path)
    other = NodeRecord(id=uuid.UUID(int=6), role=RECORD.role, name="x")
    stranger = Issuer.create("another CA", dt.timedelta(days=1))
    wrong_key = ISSUER.issue(
        subject(str(RECORD.id), RECORD.role),
        new_key().public_key(),
        usages=[CLIENT],
        lifetime=dt.timedelta(days=1),
    )
    attempts = (
        (wrong_key, ISSUER.certificate),
        (issued(tmp_path, other), ISSUER.certificate),
        (issued(tmp_path), stranger.certificate),
    )
    for certificate, ca in attempts:
        with pytest.raises(ConfigError):
            take_certificate(folder, RECORD, certificate, ca)
    assert load(folder).serial == serial_text(before.serial_number)


def test_a_folder_belongs_to_one_role(tmp_path: Path) -> None:
    choose_record(str(tmp_path), RECORD)
    machine = NodeRecord(id=RECORD.id, role=NodeRole.MACHINE, name="x")
    with pytest.raises(ConfigError, match="role applier, not machine"):
        choose_record(str(tmp_path), machine)


def test_the_pending_key_stays_until_its_certificate_is_there(tmp_path: Path) -> None:
    choose_record(str(tmp_path), RECORD)
    first = pending_key(str(tmp_path))
    assert pending_key(str(tmp_path)).public_key() == first.public_key()
    take_certificate(str(tmp_path), RECORD, issued(tmp_path), ISSUER.certificate)
    assert not (tmp_path / PENDING_KEY_FILE).exists()
    assert pending_key(str(tmp_path)).public_key() != first.public_key()


def renew_and_die(folder: str, certificate: x509.Certificate, step: int) -> None:
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event in {"open", "os.rename", "os.remove"} and folder in str(arguments[0]):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    take_certificate(folder, RECORD, certificate, ISSUER.certificate)


def test_killed_at_any_step_of_a_renewal_a_pair_that_fits_is_there(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    serials = set()
    for step in itertools.count(1):
        folder = tmp_path / str(step)
        folder.mkdir()
        old = enrolled(folder)
        new = issued(folder)
        renewal = fork.Process(target=renew_and_die, args=(str(folder), new, step))
        renewal.start()
        renewal.join(60)
        identity = load(str(folder))
        client_context(identity.tls)
        assert identity.serial in {serial_text(old.serial_number), serial_text(new.serial_number)}
        serials.add(identity.serial == serial_text(new.serial_number))
        next_one = issued(folder)
        take_certificate(str(folder), RECORD, next_one, ISSUER.certificate)
        assert load(str(folder)).serial == serial_text(next_one.serial_number)
        if renewal.exitcode == 0:
            break
        assert renewal.exitcode == -signal.SIGKILL
    assert step > 8
    assert serials == {True, False}

"""The proofs: each binds every part, and neither can stand for the other."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from replication.control.enrolment import (
    NONCE_BYTES,
    CertificateRequest,
    Challenge,
    ChallengeRequest,
    PassphraseKind,
    client_proof,
    derive_key,
    server_proof,
)
from replication.control.role import NodeRole

KEY = bytes(range(32))
CLIENT, SERVER = b"c" * NONCE_BYTES, b"s" * NONCE_BYTES
CA, CSR = b"the CA in DER", b"the request in DER"
REQUEST = CertificateRequest(
    challenge=uuid.UUID(int=1),
    role=NodeRole.PROCESS_SERVER,
    node=uuid.UUID(int=2),
    name="ps-1",
    names=("ps-1.example", "192.0.2.1"),
    bios_uuid=uuid.UUID(int=3),
    csr_pem="not bound itself: its DER is",
    proof="0" * 64,
)
ROLE = NodeRole.PROCESS_SERVER
PARTS = st.tuples(st.integers(0, 3), st.integers(0, 10**6))


def flipped(data: bytes, bit: int) -> bytes:
    bit %= len(data) * 8
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@given(PARTS)
def test_any_bit_changed_changes_the_server_s_proof(place: tuple[int, int]) -> None:
    parts = [KEY, CLIENT, SERVER, CA]
    part, bit = place
    changed = [*parts]
    changed[part] = flipped(parts[part], bit)
    proof = server_proof(parts[0], parts[1], parts[2], parts[3], ROLE)
    assert server_proof(changed[0], changed[1], changed[2], changed[3], ROLE) != proof


@given(PARTS)
def test_any_bit_changed_changes_the_node_s_proof(place: tuple[int, int]) -> None:
    parts = [KEY, CLIENT, SERVER, CSR]
    part, bit = place
    changed = [*parts]
    changed[part] = flipped(parts[part], bit)
    proof = client_proof(parts[0], parts[1], parts[2], parts[3], REQUEST)
    assert client_proof(changed[0], changed[1], changed[2], changed[3], REQUEST) != proof


@pytest.mark.parametrize(
    "claim",
    [
        {"challenge": uuid.UUID(int=9)},
        {"role": NodeRole.APPLIER},
        {"node": uuid.UUID(int=9)},
        {"name": "ps-2"},
        {"names": ("ps-1.example",)},
        {"names": ("ps-1.example192.0.2.1",)},
        {"names": ("192.0.2.1", "ps-1.example")},
        {"bios_uuid": None},
    ],
    ids=str,
)
def test_any_claim_changed_changes_the_node_s_proof(claim: dict[str, object]) -> None:
    proof = client_proof(KEY, CLIENT, SERVER, CSR, REQUEST)
    assert client_proof(KEY, CLIENT, SERVER, CSR, REQUEST.model_copy(update=claim)) != proof


def test_every_field_of_the_request_is_bound_or_bound_otherwise() -> None:
    bound_otherwise = {"csr_pem", "proof"}
    assert set(CertificateRequest.model_fields) - bound_otherwise == {
        "challenge", "role", "node", "name", "names", "bios_uuid"
    }  # fmt: skip


@given(st.binary(max_size=200), st.binary(min_size=32, max_size=32))
def test_a_proof_played_back_to_its_maker_is_none(content: bytes, nonce: bytes) -> None:
    """Reflection: a server's proof never is a node's, whatever both are about."""
    server = server_proof(KEY, nonce, nonce, content, ROLE)
    assert server != client_proof(KEY, nonce, nonce, content, REQUEST)


@given(st.binary(max_size=64), st.integers(0, 64))
def test_bytes_moved_between_parts_change_the_proof(content: bytes, cut: int) -> None:
    cut = min(cut, len(content))
    whole = server_proof(KEY, CLIENT, SERVER + content[:cut], content[cut:], ROLE)
    assert (whole == server_proof(KEY, CLIENT, SERVER, content, ROLE)) == (cut == 0)


def test_the_server_s_proof_is_for_one_role() -> None:
    assert len({server_proof(KEY, CLIENT, SERVER, CA, role) for role in NodeRole}) == len(NodeRole)


def test_machines_have_another_passphrase_than_the_appliance() -> None:
    kinds = {role: PassphraseKind.of(role) for role in NodeRole}
    assert kinds == {
        NodeRole.MACHINE: PassphraseKind.MACHINES,
        NodeRole.PROCESS_SERVER: PassphraseKind.APPLIANCE,
        NodeRole.APPLIER: PassphraseKind.APPLIANCE,
        NodeRole.COMPUTE: PassphraseKind.APPLIANCE,
    }


def test_a_passphrase_is_told_by_its_letters_alone() -> None:
    salt = b"0123456789abcdef"
    key = derive_key("abcd-efgh-2345", salt)
    assert len(key) == 32
    assert derive_key(" ABCD EFGH 2345\n", salt) == key
    assert derive_key("abcd-efgh-2346", salt) != key
    assert derive_key("abcd-efgh-2345", b"0123456789abcdeF") != key


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": "x" * 256},
        {"names": ("a b",)},
        {"names": ("x",) * 33},
        {"proof": "0" * 63},
        {"csr_pem": "x" * (16 << 10) + "x"},
        {"role": "operator"},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    document = {**REQUEST.model_dump(mode="json"), **changes}
    with pytest.raises(ValidationError):
        CertificateRequest.model_validate(document)


def test_nonces_are_of_one_size() -> None:
    assert ChallengeRequest(client_nonce=CLIENT.hex(), role=ROLE)
    with pytest.raises(ValidationError):
        ChallengeRequest(client_nonce=CLIENT.hex()[2:], role=ROLE)
    with pytest.raises(ValidationError):
        Challenge(
            challenge=uuid.UUID(int=1),
            server_nonce=SERVER.hex(),
            salt="00",
            ca_pem="",
            proof="0" * 64,
        )

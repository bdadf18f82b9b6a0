"""Enrolment over the API: what is refused, and that a refusal changes nothing."""

import secrets
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from sqlalchemy import func, select

from appliance.config_server.identity import enrolment
from appliance.config_server.identity.identity import CHALLENGES_BURST
from appliance.config_server.identity.passphrase import Passphrase, write_passphrase
from appliance.config_server.store.schema import AuditEntry, Certificate, Node
from daemon.certificates import (
    SigningRequest,
    certificate_der,
    name_part,
    names_of,
    new_key,
    read_certificate,
    signing_request,
)
from replication.control.enrolment import (
    NONCE_BYTES,
    CertificateRequest,
    Challenge,
    PassphraseKind,
    client_proof,
    derive_key,
    server_proof,
)
from replication.control.role import NodeRole
from tests.appliance.config_server.control import Control
from tests.appliance.config_server.running import Rig, open_rig

NODE = uuid.UUID(int=1234)
ANY_CHALLENGE = {"client_nonce": "0" * 64, "role": "machine"}


async def passphrase_of(rig: Rig, role: NodeRole = NodeRole.MACHINE) -> str:
    return await Control(rig, 0, Path()).passphrase(role)


class Asker:
    """A node that does by hand what daemon.enrolment does."""

    def __init__(self, rig: Rig, passphrase: str, source: str = "192.0.2.7") -> None:
        self.rig = rig
        self.client = rig.client(source=source)
        self.passphrase = passphrase
        self.nonce = secrets.token_bytes(NONCE_BYTES)
        self.key: Any = new_key()

    async def challenge(self, role: NodeRole = NodeRole.MACHINE) -> Challenge:
        answer = await self.client.post(
            "enrolment/challenges", json={"client_nonce": self.nonce.hex(), "role": role}
        )
        assert answer.status_code == 200, answer.text
        return Challenge.model_validate_json(answer.content)

    def request(self, challenge: Challenge, **claims: Any) -> CertificateRequest:
        csr_pem = claims.pop("csr_pem", signing_request(self.key, "ignored").decode())
        request = CertificateRequest.model_validate(
            {
                "challenge": challenge.challenge,
                "role": NodeRole.MACHINE,
                "node": NODE,
                "name": "web",
                "csr_pem": csr_pem,
                "proof": "0" * 64,
                **claims,
            }
        )
        key = derive_key(self.passphrase, bytes.fromhex(challenge.salt))
        try:
            der = SigningRequest.read(csr_pem).der
        except Exception:  # noqa: BLE001 - a request that is none has no proof either
            der = b""
        proof = client_proof(key, self.nonce, bytes.fromhex(challenge.server_nonce), der, request)
        return request.model_copy(update={"proof": proof.hex()})

    async def send(self, request: CertificateRequest) -> httpx.Response:
        return await self.client.post(
            "enrolment/certificates",
            content=request.model_dump_json(),
            headers={"content-type": "application/json"},
        )

    async def enrol(self, **claims: Any) -> httpx.Response:
        role = claims.get("role", NodeRole.MACHINE)
        return await self.send(self.request(await self.challenge(role), **claims))


async def counts(rig: Rig) -> tuple[int, int]:
    async with rig.server.database.reading() as session:
        nodes = await session.scalar(select(func.count()).select_from(Node))
        certificates = await session.scalar(select(func.count()).select_from(Certificate))
    return nodes or 0, certificates or 0


async def outcomes(rig: Rig, action: str) -> list[str]:
    async with rig.server.database.reading() as session:
        found = select(AuditEntry.outcome).where(AuditEntry.action == action)
        return list(await session.scalars(found.order_by(AuditEntry.id)))


async def test_the_certificate_says_what_was_proved_and_not_what_was_asked(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig, NodeRole.PROCESS_SERVER))
        answer = await asker.enrol(role=NodeRole.PROCESS_SERVER, names=["ps.example", "192.0.2.9"])
        assert answer.status_code == 200, answer.text
        certificate = read_certificate(answer.json()["certificate_pem"])
        assert name_part(certificate.subject, NameOID.COMMON_NAME) == str(NODE)
        unit = name_part(certificate.subject, NameOID.ORGANIZATIONAL_UNIT_NAME)
        assert unit == NodeRole.PROCESS_SERVER
        assert names_of(certificate) == ("ps.example", "192.0.2.9")
        certificate.verify_directly_issued_by(rig.server.identity.keyring.ca.certificate)
        assert await outcomes(rig, "node.enrol") == ["done"]


@pytest.mark.parametrize("role", [NodeRole.MACHINE, NodeRole.APPLIER])
async def test_others_get_no_server_s_certificate(tmp_path: Path, role: NodeRole) -> None:
    async with open_rig(tmp_path) as rig:
        answer = await Asker(rig, await passphrase_of(rig, role)).enrol(role=role, names=["config"])
        certificate = read_certificate(answer.json()["certificate_pem"])
        assert names_of(certificate) == ()
        usages = [
            extension.value
            for extension in certificate.extensions
            if extension.oid.dotted_string == "2.5.29.37"
        ]
        assert [usage for found in usages for usage in found] == [ExtendedKeyUsageOID.CLIENT_AUTH]


async def test_the_challenge_proves_the_ca(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        challenge = await asker.challenge()
        ca = certificate_der(read_certificate(challenge.ca_pem))
        server_nonce = bytes.fromhex(challenge.server_nonce)
        for passphrase, right in ((asker.passphrase, True), ("guessed", False)):
            key = derive_key(passphrase, bytes.fromhex(challenge.salt))
            expected = server_proof(key, asker.nonce, server_nonce, ca, NodeRole.MACHINE).hex()
            assert (challenge.proof == expected) == right


async def test_a_wrong_passphrase_is_refused_slowed_and_audited(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, "abcd-efgh")
        statuses = [(await asker.enrol()).status_code for _ in range(4)]
        assert statuses == [401] * 4
        answer = await asker.client.post("enrolment/challenges", json=ANY_CHALLENGE)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert await counts(rig) == (0, 0)
        assert await outcomes(rig, "node.enrol") == ["unauthenticated"] * 4
        elsewhere = Asker(rig, await passphrase_of(rig), source="198.51.100.1")
        assert (await elsewhere.enrol()).status_code == 200


async def test_a_challenge_is_good_for_one_use_right_or_wrong(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        right = asker.request(await asker.challenge())
        assert (await asker.send(right)).status_code == 200
        assert (await asker.send(right)).status_code == 401
        challenge = await asker.challenge()
        wrong = asker.request(challenge).model_copy(update={"proof": "0" * 64})
        assert (await asker.send(wrong)).status_code == 401
        assert (await asker.send(asker.request(challenge))).status_code == 401
        assert (await counts(rig))[1] == 1


async def test_a_challenge_ends_after_a_minute(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        challenge = await asker.challenge()
        rig.clock.ahead_ns += enrolment.CHALLENGE_SECONDS * 10**9
        assert (await asker.send(asker.request(challenge))).status_code == 401


async def test_a_proof_for_another_challenge_is_refused(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        first, second = await asker.challenge(), await asker.challenge()
        request = asker.request(first).model_copy(update={"challenge": second.challenge})
        assert (await asker.send(request)).status_code == 401


async def test_the_server_s_proof_played_back_is_refused(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        challenge = await asker.challenge()
        request = asker.request(challenge).model_copy(update={"proof": challenge.proof})
        assert (await asker.send(request)).status_code == 401


async def test_a_signing_request_that_was_swapped_on_the_way_is_refused(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        request = asker.request(await asker.challenge())
        others = signing_request(new_key(), str(NODE)).decode()
        swapped = request.model_copy(update={"csr_pem": others})
        assert (await asker.send(swapped)).status_code == 401
        assert await counts(rig) == (0, 0)


@pytest.mark.parametrize(
    "claim", [{"node": uuid.UUID(int=9)}, {"role": NodeRole.APPLIER}, {"name": "other"}], ids=str
)
async def test_a_claim_that_was_changed_on_the_way_is_refused(
    tmp_path: Path, claim: dict[str, Any]
) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        request = asker.request(await asker.challenge()).model_copy(update=claim)
        assert (await asker.send(request)).status_code == 401


async def test_an_id_with_another_key_is_a_conflict_until_it_is_revoked(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        passphrase = await passphrase_of(rig)
        first, second = Asker(rig, passphrase), Asker(rig, passphrase)
        assert (await first.enrol()).status_code == 200
        assert (await first.enrol()).status_code == 200, "the same key may ask again"
        refused = await second.enrol()
        assert refused.status_code == 409
        serial = refused.json()["hint"].split()[-1]
        answer = await rig.operator().post(f"certificates/{serial}/revoke")
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["revoked"]) == 2
        again = await first.enrol()
        assert (again.status_code, again.json()["code"]) == (409, "key_revoked")
        assert (await rig.operator().post(f"certificates/allow/{NODE}")).status_code == 200
        assert (await second.enrol()).status_code == 200


async def test_an_id_of_another_role_is_a_conflict(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        assert (await asker.enrol()).status_code == 200
        asker.passphrase = await passphrase_of(rig, NodeRole.APPLIER)
        assert (await asker.enrol(role=NodeRole.APPLIER)).status_code == 409


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)]
)
async def test_only_keys_on_our_curve_are_signed(tmp_path: Path, key: Any) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        asker.key = key
        assert (await asker.enrol()).status_code == 422


async def test_what_is_no_signing_request_or_not_signed_by_its_key_is_refused(
    tmp_path: Path,
) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        lines = signing_request(new_key(), "x").decode().splitlines()
        forged = "\n".join([*lines[:-2], lines[-2][:-8] + "AAAAAAA=", lines[-1]])
        for pem in ("", "hello", forged):
            assert (await asker.enrol(csr_pem=pem)).status_code == 422
        assert await counts(rig) == (0, 0)


async def test_names_of_a_process_server_are_names(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig, NodeRole.PROCESS_SERVER))
        for names in ([], ["a..b"], ["x:y:z"]):
            answer = await asker.enrol(role=NodeRole.PROCESS_SERVER, names=names)
            assert answer.status_code == 422, names


async def test_challenges_are_bounded_by_address_and_in_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(tmp_path) as rig:
        ask = Asker(rig, "").client.post
        statuses = [
            (await ask("enrolment/challenges", json=ANY_CHALLENGE)).status_code
            for _ in range(CHALLENGES_BURST + 20)
        ]
        assert statuses[:CHALLENGES_BURST] == [200] * CHALLENGES_BURST
        assert 429 in statuses
        monkeypatch.setattr(enrolment, "CHALLENGES_MAX", CHALLENGES_BURST)
        elsewhere = rig.client(source="198.51.100.1")
        body = ANY_CHALLENGE
        assert (await elsewhere.post("enrolment/challenges", json=body)).status_code == 429
        rig.clock.ahead_ns += enrolment.CHALLENGE_SECONDS * 10**9
        assert (await elsewhere.post("enrolment/challenges", json=body)).status_code == 200


async def test_after_a_rotation_the_old_passphrase_is_worth_nothing(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        old = Asker(rig, await passphrase_of(rig))
        challenge = await old.challenge()
        async with rig.server.database.writing() as session:
            vault = rig.server.identity.vault
            new = await write_passphrase(
                session, vault, PassphraseKind.MACHINES, Passphrase.create()
            )
        assert (await old.send(old.request(challenge))).status_code == 401
        assert (await old.enrol()).status_code == 401
        assert (await Asker(rig, new.text).enrol()).status_code == 200


def test_a_passphrase_has_160_bits_and_is_readable() -> None:
    passphrase = Passphrase.create()
    groups = passphrase.text.split("-")
    assert [len(group) for group in groups] == [4] * 8  # of 5 bits a letter
    assert set("".join(groups)) <= set("abcdefghijklmnopqrstuvwxyz234567")
    assert Passphrase.create().text != passphrase.text

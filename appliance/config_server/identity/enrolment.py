"""The config server's half of enrolment: challenges, and whether a proof is right.

Source: docs/CONTROL.md §3.
"""

import hmac
import secrets
import uuid
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.identity.keyring import Keyring
from appliance.config_server.identity.passphrase import Passphrase, ProofKeys, read_passphrase
from appliance.config_server.store.schema import Challenge as ChallengeRow
from daemon.certificates import SigningRequest
from replication.control.enrolment import (
    NONCE_BYTES,
    CertificateRequest,
    Challenge,
    PassphraseKind,
    client_proof,
    server_proof,
)
from replication.control.role import NodeRole
from replication.errors import InputError, LimitError, PeerError, UnknownCallerError

CHALLENGE_SECONDS = 60
CHALLENGES_MAX = 4096
_NS = 10**9


@dataclass(frozen=True, slots=True)
class Taken:
    """A challenge that was out and is spent now."""

    client_nonce: bytes
    server_nonce: bytes


class WrongProofError(UnknownCallerError):
    """Whoever asks for a certificate does not know the enrolment passphrase of that role."""


class Enrolment:
    """Makes challenges and checks proofs."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._keys = ProofKeys()

    async def challenge(
        self, session: AsyncSession, client_nonce: bytes, role: NodeRole, now_ns: int
    ) -> Challenge:
        """A new challenge for a node of ``role``, and the proof that our CA is ours.

        Raises LimitError when CHALLENGES_MAX are out.
        """
        expired = delete(ChallengeRow).where(ChallengeRow.expires_ns <= now_ns)
        await session.execute(expired)
        out = await session.scalar(select(func.count()).select_from(ChallengeRow)) or 0
        if out >= CHALLENGES_MAX:
            raise LimitError(
                f"{out} enrolments are under way",
                hint="try again in a minute",
                retry_after_seconds=CHALLENGE_SECONDS,
            )
        passphrase, key = await self._proving(session, role)
        row = ChallengeRow(
            id=uuid.uuid4(),
            client_nonce=client_nonce,
            server_nonce=secrets.token_bytes(NONCE_BYTES),
            expires_ns=now_ns + CHALLENGE_SECONDS * _NS,
        )
        session.add(row)
        proof = server_proof(key, client_nonce, row.server_nonce, self._keyring.ca_der, role)
        return Challenge(
            challenge=row.id,
            server_nonce=row.server_nonce.hex(),
            salt=passphrase.salt.hex(),
            ca_pem=self._keyring.ca_pem,
            proof=proof.hex(),
        )

    async def take(self, session: AsyncSession, challenge: uuid.UUID, now_ns: int) -> Taken | None:
        """Spend a challenge, in a transaction of its own: right or wrong, it is used once."""
        gone = (
            delete(ChallengeRow)
            .where(ChallengeRow.id == challenge)
            .returning(
                ChallengeRow.client_nonce, ChallengeRow.server_nonce, ChallengeRow.expires_ns
            )
        )
        row = (await session.execute(gone)).one_or_none()
        if row is None or row.expires_ns <= now_ns:
            return None
        return Taken(row.client_nonce, row.server_nonce)

    async def check(
        self, session: AsyncSession, taken: Taken | None, request: CertificateRequest
    ) -> SigningRequest:
        """The signing request, when the proof is right.

        Raises UnknownCallerError for a challenge that is not out, WrongProofError, InputError for
        what is no signing request.
        """
        if taken is None:
            raise UnknownCallerError(
                "this challenge is not known, used already, or older than "
                f"{CHALLENGE_SECONDS} seconds",
                hint="enrol again; are both clocks right?",
            )
        signing_request = read_signing_request(request.csr_pem)
        _, key = await self._proving(session, request.role)
        expected = client_proof(
            key, taken.client_nonce, taken.server_nonce, signing_request.der, request
        )
        if not hmac.compare_digest(expected, bytes.fromhex(request.proof)):
            raise WrongProofError(
                f"the proof of the enrolment passphrase of a {request.role} is wrong",
                hint="`understudy-config-server passphrase show --for "
                f"{PassphraseKind.of(request.role)}` tells the present one",
            )
        return signing_request

    async def _proving(self, session: AsyncSession, role: NodeRole) -> tuple[Passphrase, bytes]:
        """The passphrase that a node of ``role`` proves, and the key that is derived from it."""
        kind = PassphraseKind.of(role)
        passphrase = await read_passphrase(session, self._keyring.vault, kind)
        assert passphrase is not None, "one is made before the first request"
        return passphrase, await self._keys.of(kind, passphrase)


def read_signing_request(pem: str) -> SigningRequest:
    """Raises InputError unless it is one for a P-256 key that signed it."""
    try:
        return SigningRequest.read(pem)
    except PeerError as error:
        raise InputError(f"csr_pem: {error.args[0]}") from error

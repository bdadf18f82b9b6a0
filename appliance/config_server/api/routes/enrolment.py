"""``enrolment``: how a node proves the passphrase and gets its certificate.

Source: docs/CONTROL.md §3.
"""

from dataclasses import replace
from typing import Annotated

from appliance.config_server.api.access import anyone
from appliance.config_server.api.limits import source_of
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.identity.enrolment import WrongProofError
from daemon.certificates import certificate_pem, serial_text
from replication.control.enrolment import (
    CertificateRequest,
    Challenge,
    ChallengeRequest,
    Enrolled,
)
from replication.errors import LimitError

router = Router("enrolment")
AnyCaller = Annotated[Caller, anyone()]
ENROLLED = "node.enrol"


@router.post("/challenges")
async def challenge(server: ServerOf, caller: AnyCaller, request: ChallengeRequest) -> Challenge:
    """Get a challenge; its proof tells that the CA in it is the one of who knows the passphrase."""
    server.attempts.check(caller.source)
    wait = server.identity.challenge_rates.take(source_of(caller.source))
    if wait:
        raise LimitError(
            "too many enrolments from this address", hint="wait", retry_after_seconds=wait
        )
    async with server.database.writing() as session:
        return await server.identity.enrolment.challenge(
            session, bytes.fromhex(request.client_nonce), request.role, server.clock()
        )


@router.post("/certificates")
async def certificate(server: ServerOf, caller: AnyCaller, request: CertificateRequest) -> Enrolled:
    """Get a certificate for a proof of the enrolment passphrase."""
    identity = server.identity
    server.attempts.check(caller.source)
    async with server.database.writing() as session:
        taken = await identity.enrolment.take(session, request.challenge, server.clock())
    try:
        async with server.database.reading() as session:
            signing_request = await identity.enrolment.check(session, taken, request)
    except WrongProofError as error:
        server.attempts.failed(caller.source)
        await server.audit.refused(caller, ENROLLED, str(request.node), error.code)
        raise
    proved = replace(caller, name=str(request.node), role=request.role, node=request.node)
    detail: dict[str, object] = {"name": request.name, "role": request.role}
    async with server.change(proved, ENROLLED, str(request.node), detail) as session:
        issued = await identity.authority.enrol(session, request, signing_request, server.clock())
        detail["serial"] = serial_text(issued.serial_number)
    return Enrolled(
        node=request.node,
        certificate_pem=certificate_pem(issued).decode(),
        ca_pem=identity.keyring.ca_pem,
    )

"""Schemathesis over the OpenAPI document and real HTTPS: what the document allows is answered as it
says, what it does not allow is refused, and nothing at all is answered by a defect.
"""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.running import open_rig
from tests.appliance.config_server.serving import Port, open_port

EXAMPLES = 8
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
async def test_the_api_is_as_its_document_says(
    tmp_path: Path, mode: schemathesis.GenerationMode
) -> None:
    async with (
        open_rig(tmp_path) as rig,
        open_port(rig, tmp_path) as port,
    ):
        document = rig.app.openapi()
        _, machine = await port.enrol(NodeRole.MACHINE)
        operator = _session(port, certificate=None)
        operator.headers["authorization"] = f"Bearer {rig.tokens[OperatorRole.CONTRIBUTOR]}"
        node = _session(port, certificate=machine)
        await asyncio.to_thread(_try_all, document, mode, port, operator, node)
        told = await asyncio.to_thread(operator.get, f"https://localhost:{port.number}/api/v1/me")
        assert told.status_code == 200  # it still answers


def _session(port: Port, *, certificate: Path | None) -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    session.verify = str(port.authority.folder / "ca.pem")
    session.cert = str(certificate) if certificate else None
    return session


def _try_all(
    document: dict[str, Any],
    mode: schemathesis.GenerationMode,
    port: Port,
    operator: requests.Session,
    node: requests.Session,
) -> None:
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=f"https://localhost:{port.number}")
    failures, tried = [], 0
    statuses: Counter[int] = Counter()
    found: Any
    for found in schema.get_all_operations():
        operation = found.ok()
        session = node if "/node/" in operation.path else operator
        if mode is schemathesis.GenerationMode.NEGATIVE:
            if not (list(operation.iter_parameters()) or operation.body):
                continue  # there is nothing to get wrong
            told = _try(operation, mode, session, [*CHECKS, negative_data_rejection], statuses)
        else:
            told = _try(operation, mode, session, CHECKS, statuses)
        tried += 1
        if told:
            failures.append(f"{operation.label}: {told}")
    assert not failures, "\n\n".join(failures)
    assert tried > 20
    if mode is schemathesis.GenerationMode.POSITIVE:
        assert statuses[200] > 20 * EXAMPLES // 4


def _try(
    operation: Any,
    mode: schemathesis.GenerationMode,
    session: requests.Session,
    checks: list[Any],
    statuses: Counter[int],
) -> str:
    """What is wrong with an operation; empty when nothing was found."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(mode))
    def answers(case: Any) -> None:
        if isinstance(case.query, dict) and "wait_seconds" in case.query:
            case.query["wait_seconds"] = (
                min(case.query["wait_seconds"], 0.1)
                if isinstance(case.query["wait_seconds"], float | int)
                else case.query["wait_seconds"]
            )
        told = case.call_and_validate(
            session=session, checks=checks, timeout=20, verify=session.verify, cert=session.cert
        )
        statuses[told.status_code] += 1

    try:
        answers()
    except Unsatisfiable:
        return ""  # nothing that is wrong can be sent here
    except BaseExceptionGroup as group:
        return "; ".join(map(str, group.exceptions))
    except (AssertionError, requests.RequestException) as error:
        return str(error)
    return ""

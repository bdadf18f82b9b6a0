"""What the node routes let through, and what not."""

import asyncio
import time
import uuid
from pathlib import Path

import pytest
from sqlalchemy import select

from appliance.config_server.identity import data_keys
from appliance.config_server.store.schema import AuditEntry, Machine
from daemon.certificates import new_key, signing_request
from replication.control.report import REPORT_BYTES_MAX, ApplierReport, MachineReport
from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.running import Rig, open_rig


async def waits(rig: Rig, node: uuid.UUID) -> None:
    async with asyncio.timeout(20):
        while node not in rig.server.nodes.versions.waiters.nodes:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def test_a_node_reports_as_what_it_is(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        machine = rig.node(await rig.enrol(NodeRole.MACHINE))
        right = MachineReport(time_ns=1).model_dump(mode="json")
        answer = await machine.post("node/reports", json=right)
        assert answer.status_code == 200, answer.text
        assert answer.json()["assignment"] == 1
        wrong = ApplierReport(time_ns=1).model_dump(mode="json")
        refused: tuple[object, ...] = (
            wrong,
            {**right, "kind": "toaster"},
            {**right, "time_ns": -1},
            [],
            "x",
        )
        for body in refused:
            assert (await machine.post("node/reports", json=body)).status_code == 422
        newer = {**right, "a_field_of_a_newer_version": True}
        assert (await machine.post("node/reports", json=newer)).status_code == 200
        large = b'{"kind": "machine", "time_ns": 1, "x": "' + b"x" * REPORT_BYTES_MAX + b'"}'
        answer = await machine.post("node/reports", content=large)
        assert answer.status_code == 413


@pytest.mark.parametrize("query", ["after=-1", "wait_seconds=61", "wait_seconds=nan", "after=x"])
async def test_a_question_out_of_bounds_is_refused(tmp_path: Path, query: str) -> None:
    async with open_rig(tmp_path) as rig:
        machine = rig.node(await rig.enrol(NodeRole.MACHINE))
        assert (await machine.get(f"node/assignment?{query}")).status_code == 422


async def test_an_assignment_is_told_when_its_version_is_another(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        peer = await rig.enrol(NodeRole.APPLIER)
        applier = rig.node(peer)
        assert (await applier.get("node/assignment")).json()["version"] == 1
        assert (await applier.get("node/assignment?after=1")).status_code == 204
        assert (await applier.get("node/assignment?after=40")).json()["version"] == 1
        waiting = asyncio.create_task(applier.get("node/assignment?after=1&wait_seconds=20"))
        await waits(rig, peer.node)
        async with rig.server.database.writing() as session:
            await rig.server.nodes.bump(session, [peer.node])
        assert (await waiting).json()["version"] == 2


async def test_an_open_question_ends_when_the_daemon_does(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        peer = await rig.enrol(NodeRole.APPLIER)
        question = rig.node(peer).get("node/assignment?after=1&wait_seconds=60")
        waiting = asyncio.create_task(question)
        await waits(rig, peer.node)
        began = time.monotonic()
        rig.server.stop.set()
        assert (await waiting).status_code == 204
        assert time.monotonic() - began < 5


async def test_data_keys_are_audited_and_are_not_in_the_audit(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        peer = await rig.enrol(NodeRole.MACHINE)
        other = await rig.enrol(NodeRole.MACHINE)
        agent = rig.node(peer)
        path = f"node/data-keys/{peer.node}"
        assert (await agent.get(path)).status_code == 404
        async with rig.server.database.writing() as session:
            session.add(Machine(id=peer.node, name="web", state="enabling", since_ns=0))
            await data_keys.ensure(session, rig.server.identity.vault, peer.node, 1)
            await data_keys.ensure(session, rig.server.identity.vault, peer.node, 2)
        key = (await agent.get(path)).json()["data_key"]
        assert (await agent.get(path)).json()["data_key"] == key
        assert (await rig.node(other).get(path)).status_code == 403
        process_server = rig.node(await rig.enrol(NodeRole.PROCESS_SERVER))
        assert (await process_server.get(path)).status_code == 403
        assert (await rig.operator().get(path)).status_code == 401
        async with rig.server.database.reading() as session:
            entries = (
                await session.scalars(
                    select(AuditEntry).where(AuditEntry.action == "data-key.give")
                )
            ).all()
        outcomes = [entry.outcome for entry in entries]
        assert outcomes == ["not_found", "done", "done", "forbidden"]
        assert key not in str([entry.detail for entry in entries])


async def test_revoking_takes_a_contributor_and_a_certificate_that_is_there(
    tmp_path: Path,
) -> None:
    async with open_rig(tmp_path) as rig:
        peer = await rig.enrol(NodeRole.MACHINE)
        node = rig.node(peer)
        path = f"certificates/{peer.serial}/revoke"
        for role in (OperatorRole.READER, OperatorRole.OPERATOR):
            assert (await rig.operator(role).post(path)).status_code == 403
        contributor = rig.operator()
        assert (await node.get("node/assignment")).status_code == 200
        assert (await contributor.post(path)).json()["revoked"] == [peer.serial]
        assert (await node.get("node/assignment")).status_code == 401
        assert (await contributor.post(path)).json()["revoked"] == []
        assert (await contributor.post("certificates/abc/revoke")).status_code == 404
        assert (await contributor.post("certificates/XYZ/revoke")).status_code == 422
        (listed,) = (await rig.operator(OperatorRole.READER).get("certificates")).json()["items"]
        assert listed["serial"] == peer.serial
        assert listed["node"] == str(peer.node)
        assert listed["revoked_by"]


async def test_all_certificates_of_a_node_go_together(tmp_path: Path) -> None:
    """Whoever stole one could have renewed it."""
    async with open_rig(tmp_path) as rig:
        peer = await rig.enrol(NodeRole.MACHINE)
        body = {"csr_pem": signing_request(new_key(), str(uuid.uuid4())).decode()}
        renewed = await rig.node(peer).post("node/certificate", json=body)
        assert renewed.status_code == 200, renewed.text
        answer = await rig.operator().post(f"certificates/{peer.serial}/revoke")
        assert len(answer.json()["revoked"]) == 2

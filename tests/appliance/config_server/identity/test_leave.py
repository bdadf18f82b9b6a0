"""Who is let in under which passphrase, with which key, by which name; and who is not."""

import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from appliance.config_server.identity import data_keys
from appliance.config_server.identity.certificates import NEW_KEY_SECONDS
from appliance.config_server.identity.passphrase import SETTINGS
from appliance.config_server.store.schema import Machine, Setting
from replication.control.enrolment import PassphraseKind
from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.identity.test_enrolment import (
    NODE,
    Asker,
    counts,
    outcomes,
    passphrase_of,
)
from tests.appliance.config_server.running import DAY_NS, Rig, open_rig

APPLIANCE = [NodeRole.PROCESS_SERVER, NodeRole.APPLIER]


async def asker_for(rig: Rig, role: NodeRole, **claims: Any) -> httpx.Response:
    """A new node of ``role`` that proves its own passphrase; what it is answered."""
    asker = Asker(rig, await passphrase_of(rig, role))
    return await asker.enrol(**{"role": role, "node": uuid.uuid4(), **claims})


async def revoke(rig: Rig, node: uuid.UUID) -> None:
    listed = (await rig.operator().get("certificates")).json()["items"]
    serial = next(one["serial"] for one in listed if one["node"] == str(node))
    assert (await rig.operator().post(f"certificates/{serial}/revoke")).status_code == 200


@pytest.mark.parametrize("role", APPLIANCE)
async def test_the_machines_passphrase_lets_no_part_of_the_appliance_in(
    tmp_path: Path, role: NodeRole
) -> None:
    """Everybody who looks after one machine has it; streams and data keys are not for them."""
    async with open_rig(tmp_path) as rig:
        rogue = Asker(rig, await passphrase_of(rig))
        challenges = [await rogue.challenge(role), await rogue.challenge(NodeRole.MACHINE)]
        for challenge in challenges:
            request = rogue.request(challenge, role=role, names=["ps.example"])
            assert (await rogue.send(request)).status_code == 401
        assert await counts(rig) == (0, 0)


async def test_the_appliance_s_passphrase_lets_no_machine_in(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig, NodeRole.APPLIER))
        assert (await asker.enrol()).status_code == 401
        assert (await asker.enrol(role=NodeRole.APPLIER)).status_code == 200


async def test_a_state_of_one_passphrase_gets_the_other_one_at_the_next_start(
    tmp_path: Path,
) -> None:
    async with open_rig(tmp_path) as rig:
        before = await passphrase_of(rig)
        async with rig.server.database.writing() as session:
            row = await session.get(Setting, SETTINGS[PassphraseKind.APPLIANCE])
            await session.delete(row)
    async with open_rig(tmp_path) as rig:
        assert await passphrase_of(rig) == before
        assert await passphrase_of(rig, NodeRole.APPLIER) != before
        assert (await asker_for(rig, NodeRole.APPLIER)).status_code == 200


@pytest.mark.parametrize("ended", ["revoked", "expired"])
async def test_a_known_machine_with_a_new_key_needs_leave(tmp_path: Path, ended: str) -> None:
    """Whoever has the passphrase alone must not become a machine and be given its data key."""
    async with open_rig(tmp_path) as rig:
        first, rogue = [Asker(rig, await passphrase_of(rig)) for _ in range(2)]
        assert (await first.enrol()).status_code == 200
        async with rig.server.database.writing() as session:
            session.add(Machine(id=NODE, name="web", state="protected", since_ns=0))
            await data_keys.ensure(session, rig.server.identity.vault, NODE, 1)
        if ended == "revoked":
            await revoke(rig, NODE)
        else:
            rig.clock.ahead_ns += 100 * DAY_NS
        refused = await rogue.enrol()
        assert (refused.status_code, refused.json()["code"]) == (409, "new_key")
        assert f"certificates allow {NODE}" in refused.json()["hint"]
        assert (await counts(rig))[1] == 1
        assert (await outcomes(rig, "node.enrol"))[-1] == "new_key"


async def test_an_expired_machine_with_its_old_key_needs_no_leave(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        asker = Asker(rig, await passphrase_of(rig))
        assert (await asker.enrol()).status_code == 200
        rig.clock.ahead_ns += 100 * DAY_NS
        assert (await asker.enrol()).status_code == 200


async def test_leave_is_good_once_and_for_an_hour(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        askers = [Asker(rig, await passphrase_of(rig)) for _ in range(4)]
        allow = f"certificates/allow/{NODE}"
        operator = rig.operator()
        assert (await operator.post(allow)).status_code == 404, "a new one needs none"
        assert (await askers[0].enrol()).status_code == 200
        assert (await operator.post(allow)).status_code == 409, "its certificate is good"
        await revoke(rig, NODE)
        for role in (OperatorRole.READER, OperatorRole.OPERATOR):
            assert (await rig.operator(role).post(allow)).status_code == 403
        allowed = await operator.post(allow)
        assert allowed.json()["until_ns"] > rig.clock()
        rig.clock.ahead_ns += NEW_KEY_SECONDS * 10**9
        assert (await askers[1].enrol()).status_code == 409, "too late"
        assert (await operator.post(allow)).status_code == 200
        assert (await askers[1].enrol()).status_code == 200
        assert (await askers[1].enrol()).status_code == 200, "its answer may have been lost"
        await revoke(rig, NODE)
        assert (await askers[2].enrol()).status_code == 409, "it was for one key"
        told = await outcomes(rig, "certificate.allow")
        assert told == ["not_found", "conflict", "done", "done"]


async def test_revoking_takes_leave_back(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        first, second = [Asker(rig, await passphrase_of(rig)) for _ in range(2)]
        assert (await first.enrol()).status_code == 200
        await revoke(rig, NODE)
        assert (await rig.operator().post(f"certificates/allow/{NODE}")).status_code == 200
        await revoke(rig, NODE)
        assert (await second.enrol()).status_code == 409


async def test_a_process_server_may_share_the_config_servers_host(tmp_path: Path) -> None:
    own = ["config.example", "192.0.2.1"]
    async with open_rig(tmp_path, listen={"names": own}) as rig:
        answer = await asker_for(rig, NodeRole.PROCESS_SERVER, names=own)
        assert answer.status_code == 200, answer.text


async def test_no_two_process_servers_are_reached_under_one_name(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        holder = uuid.uuid4()
        first: dict[str, Any] = {"name": "ps-1", "names": ["ps.example", "localhost"]}
        second: dict[str, Any] = {"name": "ps-2", "names": ["localhost", "PS.example"]}
        role = NodeRole.PROCESS_SERVER
        assert (await asker_for(rig, role, node=holder, **first)).status_code == 200
        refused = await asker_for(rig, role, **second)
        assert refused.status_code == 409
        assert "of the process server ps-1" in refused.json()["message"]
        other = await asker_for(rig, role, **{**second, "names": ["ps-2.example", "localhost"]})
        assert other.status_code == 200, "loopback is nobody's"
        await revoke(rig, holder)
        assert (await asker_for(rig, role, **{**second, "name": "ps-3"})).status_code == 200


@pytest.mark.parametrize(
    "name", [str(uuid.uuid4()), uuid.uuid4().hex, str(uuid.uuid4()).upper()], ids=len
)
async def test_a_name_that_could_be_an_id_is_refused(tmp_path: Path, name: str) -> None:
    async with open_rig(tmp_path) as rig:
        refused = await asker_for(rig, NodeRole.MACHINE, name=name)
        assert refused.status_code == 422
        assert "taken for an id" in refused.json()["message"]
        assert await counts(rig) == (0, 0)


async def test_a_name_means_one_live_node_of_a_role(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        first, second = uuid.uuid4(), uuid.uuid4()
        asker = Asker(rig, await passphrase_of(rig))
        assert (await asker.enrol(node=first, name="web")).status_code == 200
        refused = await asker_for(rig, NodeRole.MACHINE, name="web")
        assert refused.status_code == 409
        assert "--name" in refused.json()["hint"]
        assert (await asker_for(rig, NodeRole.APPLIER, name="web")).status_code == 200
        assert (await asker.enrol(node=first, name="web")).status_code == 200, "its own"
        assert (await asker.enrol(node=second, name="db")).status_code == 200
        assert (await asker.enrol(node=second, name="web")).status_code == 409, "renamed to it"
        await revoke(rig, first)
        assert (await asker_for(rig, NodeRole.MACHINE, name="web")).status_code == 200

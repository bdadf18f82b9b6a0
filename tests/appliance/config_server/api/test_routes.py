"""The routes of the server itself."""

from pathlib import Path

from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.running import open_rig


async def test_a_token_is_made_used_and_revoked(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        contributor = rig.operator()
        made = await contributor.post("tokens", json={"name": "ci", "role": "reader", "days": 1})
        assert made.status_code == 201, made.text
        secret = made.json()["token"]
        user = rig.client(token=secret)
        assert (await user.get("me")).json() == {"name": "ci", "role": "reader"}
        listed = (await contributor.get("tokens")).json()["items"]
        assert "ci" in [token["name"] for token in listed]
        assert secret not in str(listed)
        assert (await contributor.delete("tokens/ci")).status_code == 204
        assert (await user.get("me")).status_code == 401
        told = (await contributor.get("audit")).json()["items"]
        assert [(entry["action"], entry["target"], entry["outcome"]) for entry in told] == [
            ("token.revoke", "ci", "done"),
            ("token.create", "ci", "done"),
        ]


async def test_a_node_is_no_operator(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        node = rig.node(await rig.enrol(NodeRole.MACHINE))
        assert (await node.get("me")).status_code == 401
        assert (await rig.operator(OperatorRole.READER).get("me")).status_code == 200

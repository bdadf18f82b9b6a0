"""A node's client against the real config server over TLS."""

import asyncio
import contextlib
import datetime as dt
import stat
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.config_server.identity import certificates, data_keys
from appliance.config_server.store.schema import Certificate, Machine, Node
from daemon.certificates import names_of, read_certificate
from daemon.control_call import RefusedError
from daemon.control_client import HEALTH_PART, ControlClient
from daemon.control_config import ControlConfig
from daemon.identity import ASSIGNMENT_FILE, DATA_KEYS_FOLDER, NodeIdentity, load
from daemon.service import Health
from replication.control.assignment import (
    ApplierAssignment,
    MachineAssignment,
    ProcessServerAssignment,
)
from replication.control.report import ApplierReport, MachineReport, ProcessServerReport
from replication.control.role import NodeRole
from replication.errors import ConfigError, UnavailableError
from tests.appliance.config_server.control import Control, open_control

SECONDS_MAX = 20.0


async def until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not holds():  # noqa: ASYNC110 - nobody tells of what is awaited
            await asyncio.sleep(0.02)


async def report() -> MachineReport:
    return MachineReport(time_ns=time.time_ns())


@contextlib.asynccontextmanager
async def running(client: ControlClient[Any], provider: Any = report) -> AsyncIterator[None]:
    async with client:
        task = asyncio.create_task(client.run(provider))
        try:
            yield
        finally:
            client._stop.set()
            await task


async def bump(control: Control, node: uuid.UUID) -> None:
    async with control.server.database.writing() as session:
        await control.server.nodes.bump(session, [node])


async def test_a_change_is_heard_at_once_and_is_on_disk_before(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        client = control.client(identity, MachineAssignment)
        heard = []
        async with running(client):
            async for assignment in client.assignments():
                path = Path(identity.folder) / ASSIGNMENT_FILE
                assert MachineAssignment.model_validate_json(path.read_bytes()) == assignment
                assert stat.S_IMODE(path.stat().st_mode) == 0o600
                heard.append((assignment.version, time.monotonic()))
                if len(heard) == 3:
                    break
                changed = time.monotonic()
                await bump(control, identity.node)
        assert [version for version, _ in heard] == [1, 2, 3]
        assert heard[-1][1] - changed < 1.0


async def test_a_burst_of_changes_ends_at_the_newest(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        client = control.client(identity, MachineAssignment)
        async with running(client):
            for _ in range(20):
                await bump(control, identity.node)
            await until(lambda: client.version == 21)
        assert client.assignment == control.client(identity, MachineAssignment).assignment


async def test_without_a_config_server_it_goes_on_by_what_it_has(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        client = control.client(identity, MachineAssignment)
        async with running(client):
            await until(lambda: client.assignment)
        port = control.port
    health, stop = Health(), asyncio.Event()
    config = ControlConfig(
        config_server=f"https://localhost:{port}",
        identity_folder=identity.folder,
        report_seconds=0.2,
    )
    client = ControlClient(config, MachineAssignment, health=health, stop=stop)
    async with running(client):
        first = await anext(client.assignments())
        assert first.machine == identity.node
        await until(lambda: health.warnings)
        told = health.warnings[HEALTH_PART]
        assert "since 20" in told
        assert "going on by assignment 1" in told
        assert health.state == "warning"
        with pytest.raises(UnavailableError):
            await client.data_key(identity.node)
        async with open_control(tmp_path, port=port) as control:
            await until(lambda: not health.warnings)
            await bump(control, identity.node)
            await until(lambda: client.version == 2)


async def test_a_config_server_restored_from_an_older_backup_is_followed(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        path = Path(identity.folder) / ASSIGNMENT_FILE
        newer = MachineAssignment(version=40, machine=identity.node, name="x", protected=True)
        path.touch(0o600)
        path.write_text(newer.model_dump_json())
        client = control.client(identity, MachineAssignment)
        assert client.version == 40
        async with running(client):
            await until(lambda: client.version == 1)


@pytest.mark.parametrize("content", ["", "{}", '{"version": 3}', "\0"])
async def test_a_damaged_assignment_is_fetched_again(tmp_path: Path, content: str) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        path = Path(identity.folder) / ASSIGNMENT_FILE
        path.touch(0o600)
        path.write_text(content)
        client = control.client(identity, MachineAssignment)
        assert client.assignment is None
        async with running(client):
            await until(lambda: client.version == 1)


async def test_reports_come_by_themselves_and_at_once_when_asked(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.APPLIER)
        client = control.client(identity, ApplierAssignment, report_seconds=300)
        made = 0

        async def provider() -> ApplierReport:
            nonlocal made
            made += 1
            return ApplierReport(time_ns=time.time_ns(), free_bytes=made)

        def heard() -> int:
            found = control.server.nodes.book.newest(identity.node)
            if found is None:
                return 0
            assert isinstance(found.report, ApplierReport)
            return found.report.free_bytes

        control.rig.clock.ahead_ns = 7 * 10**9
        async with running(client, provider):
            await until(lambda: heard() == 1)
            client.report_now()
            await until(lambda: heard() == 2)
            await until(lambda: client.server_ahead_ns > 6 * 10**9)
            await asyncio.sleep(0.3)
            assert made == 2


async def test_every_report_reaches_the_table(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        client = control.client(identity, MachineAssignment)
        async with running(client):
            await until(lambda: control.server.nodes.book.newest(identity.node))
            await control.server.nodes.book.flush()
        async with control.server.database.reading() as session:
            row = await session.get(Node, identity.node)
        assert row is not None
        assert row.report is not None
        assert MachineReport.model_validate(row.report).kind == "machine"
        assert abs(time.time_ns() - row.seen_ns) < 60 * 10**9


async def protect(control: Control, machine: uuid.UUID, applier: uuid.UUID | None = None) -> None:
    async with control.server.database.writing() as session:
        session.add(
            Machine(id=machine, name="web", applier_id=applier, state="enabling", since_ns=0)
        )
        await data_keys.ensure(session, control.server.identity.vault, machine, 0)


async def test_a_data_key_is_fetched_once_and_kept(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        await protect(control, identity.node)
        async with control.client(identity, MachineAssignment) as client:
            key = await client.data_key(identity.node)
        assert len(key) == 32
        path = Path(identity.folder) / DATA_KEYS_FOLDER / f"{identity.node}.key"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert bytes.fromhex(path.read_text()) == key
    away = ControlClient(
        control.config(identity_folder=identity.folder),
        MachineAssignment,
        health=Health(),
        stop=asyncio.Event(),
    )
    async with away:
        assert await away.data_key(identity.node) == key
        away.forget_data_key(identity.node)
        with pytest.raises(UnavailableError):
            await away.data_key(identity.node)


async def test_a_data_key_of_somebody_else_is_refused(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        machine = await control.enrol(NodeRole.MACHINE)
        applier = await control.enrol(NodeRole.APPLIER)
        other = await control.enrol(NodeRole.APPLIER)
        process_server = await control.enrol(NodeRole.PROCESS_SERVER)
        await protect(control, machine.node, applier.node)
        async with (
            control.client(applier, ApplierAssignment) as its_applier,
            control.client(other, ApplierAssignment) as another,
            control.client(process_server, ProcessServerAssignment) as server,
        ):
            assert len(await its_applier.data_key(machine.node)) == 32
            for client in (another, server):
                with pytest.raises(RefusedError) as caught:
                    await client.data_key(machine.node)
                assert caught.value.status == 403


async def test_a_revoked_node_is_refused_at_once_and_says_so(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        client = control.client(identity, MachineAssignment)
        async with running(client):
            await until(lambda: client.assignment)
            answer = await control.rig.operator().post(f"certificates/{identity.serial}/revoke")
            assert answer.json()["revoked"] == [identity.serial]
            await until(lambda: control.health.criticals)
            assert "enrol this node again" in control.health.criticals[HEALTH_PART]
            assert client.version == 1, "what it has it goes on by"


async def test_process_servers_hear_of_a_revocation_at_once(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        machine = await control.enrol(NodeRole.MACHINE)
        identity = await control.enrol(NodeRole.PROCESS_SERVER)
        client = control.client(identity, ProcessServerAssignment)

        async def provider() -> ProcessServerReport:
            return ProcessServerReport(time_ns=time.time_ns(), url="https://localhost:9443")

        async with running(client, provider):
            await until(lambda: client.assignment)
            began = time.monotonic()
            await control.rig.operator().post(f"certificates/{machine.serial}/revoke")
            await until(lambda: client.assignment and client.assignment.revoked)
            assert time.monotonic() - began < 5.0
            assert client.assignment is not None
            assert client.assignment.revoked == (machine.serial,)


def due(identity: NodeIdentity) -> NodeIdentity:
    """As if two thirds of its life were over."""
    return replace(identity, begins=identity.begins - dt.timedelta(days=365))


async def test_a_certificate_is_renewed_under_itself(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.PROCESS_SERVER)
        renewed: list[NodeIdentity] = []
        client = control.client(identity, ProcessServerAssignment)
        client._on_renewed = renewed.append
        client._identity = due(identity)

        async def provider() -> ProcessServerReport:
            return ProcessServerReport(time_ns=time.time_ns())

        async with running(client, provider):
            await until(lambda: renewed)
            assert client.identity.serial != identity.serial
            assert load(identity.folder) == client.identity == renewed[0]
            await bump(control, identity.node)
            await until(lambda: client.version == 2)
        async with control.server.database.reading() as session:
            rows = [
                await session.get(Certificate, serial)
                for serial in (identity.serial, client.identity.serial)
            ]
        assert all(row is not None and row.revoked_ns is None for row in rows)
        pem = (Path(identity.folder) / "node.pem").read_text()
        assert names_of(read_certificate(pem)) == ("localhost", "127.0.0.1")


async def test_a_revoked_certificate_renews_nothing(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        await control.rig.operator().post(f"certificates/{identity.serial}/revoke")
        client = control.client(identity, MachineAssignment)
        client._identity = due(identity)
        async with running(client):
            await until(lambda: "renewal" in control.health.criticals.get(HEALTH_PART, ""))
        assert load(identity.folder) == identity


async def test_renewals_are_bounded(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        async with control.client(identity, MachineAssignment) as client:
            for _ in range(certificates.LIVE_CERTIFICATES_MAX - 1):
                await (await client._renew_now()).close()
            with pytest.raises(UnavailableError, match="certificates already"):
                await client._renew_now()


def test_the_config_is_https_and_bounded() -> None:
    with pytest.raises(ValueError, match="https"):
        ControlConfig(config_server="http://x", identity_folder="/x")
    with pytest.raises(ValueError, match="less than or equal"):
        ControlConfig(config_server="https://x", identity_folder="/x", wait_seconds=61)
    config = ControlConfig(config_server="https://x/", identity_folder="/x")
    assert config.config_server == "https://x"


async def test_an_identity_of_another_role_or_none_is_told(tmp_path: Path) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        with pytest.raises(ConfigError, match="role machine, not applier"):
            control.client(identity, ApplierAssignment)
        nobody = control.config("nobody")
        with pytest.raises(ConfigError, match="nobody is enrolled"):
            ControlClient(nobody, MachineAssignment, health=Health(), stop=asyncio.Event())

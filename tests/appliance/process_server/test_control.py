"""A process server that a config server tells whose streams it takes."""

import socket
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from appliance.process_server.admission import Admission, Shown
from appliance.process_server.config import Config
from appliance.process_server.refusal import Kind, RefusedError
from daemon.certificates import serial_text
from daemon.identity import load
from daemon.tls import TlsFiles, client_context
from replication.bookmark import Stamp
from replication.control.assignment import ProcessServerAssignment
from replication.control.role import NodeRole
from replication.errors import ConfigError
from tests.appliance.orders import Orders
from tests.appliance.process_server.rig import Agent, Certificates, ProcessServer, become
from tests.appliance.process_server.sample import make_changeset
from tests.appliance.process_server.test_durability import fill, small_disk
from tests.azure_emu.fixtures import EmulatorProcess, free_ports

__all__ = ["small_disk"]

NODE = uuid.uuid4()


@pytest.fixture
async def orders(tmp_path: Path) -> AsyncIterator[Orders]:
    async with Orders(tmp_path / "orders", free_ports(1)[0]) as orders:
        yield orders


def controlled_server(
    tmp_path: Path,
    certificates: Certificates,
    azurite: EmulatorProcess,
    orders: Orders,
    *,
    spool: Path | None = None,
) -> ProcessServer:
    """Not started."""
    orders.identity(tmp_path / "identity", NodeRole.PROCESS_SERVER, NODE)
    return ProcessServer(
        tmp_path,
        certificates,
        azurite.connection_string,
        spool=spool,
        authority=f"""[control]
config_server = "{orders.url}"
identity_folder = "{tmp_path / "identity"}"
report_seconds = 0.2
wait_seconds = 2.0
""",
    )


@pytest.fixture
def server(
    tmp_path: Path, certificates: Certificates, azurite: EmulatorProcess, orders: Orders
) -> Iterator[ProcessServer]:
    server = controlled_server(tmp_path, certificates, azurite, orders)
    try:
        yield server
    finally:
        server.kill()


def assignment(
    version: int,
    *machines: uuid.UUID,
    ended: tuple[uuid.UUID, ...] = (),
    revoked: tuple[str, ...] = (),
) -> ProcessServerAssignment:
    return ProcessServerAssignment(version=version, machines=machines, ended=ended, revoked=revoked)


def serial_of(files: TlsFiles) -> str:
    found = ssl._ssl._test_decode_cert(files.certificate)  # type: ignore[attr-defined]
    return serial_text(found["serialNumber"])


async def test_streams_are_taken_of_assigned_machines_alone_and_they_change(
    server: ProcessServer, orders: Orders
) -> None:
    machine, other = uuid.uuid4(), uuid.uuid4()
    server.start()
    tls = orders.machine_tls(machine)
    async with Agent(server, machine, tls) as agent, Agent(server, machine, tls) as second:
        assert (await agent.state()).told == (403, "forbidden")  # nobody has said anything
        await orders.assign(NODE, assignment(1, machine))
        await become(lambda: answers(agent, 200), seconds_max=10)
        await agent.send(make_changeset(machine, Stamp(1, 1)))
        await orders.assign(NODE, assignment(2, other))
        await become(lambda: answers(agent, 403), seconds_max=10)
        reply = await second.put(make_changeset(machine, Stamp(1, 2)), 0)
        assert reply.told == (403, "forbidden")
        assert "not among those" in reply.refusal.message
        await orders.assign(NODE, assignment(3, machine, other))
        await become(lambda: answers(agent, 200), seconds_max=10)


async def test_spool_lets_go_of_a_machine_that_has_ended_and_keeps_its_position(
    server: ProcessServer, orders: Orders
) -> None:
    machine, other = uuid.uuid4(), uuid.uuid4()
    server.start()
    tls = orders.machine_tls(machine)
    await orders.assign(NODE, assignment(1, machine))

    async def is_empty() -> bool:
        return not server.spooled(machine)

    async with Agent(server, machine, tls) as agent:
        await become(lambda: answers(agent, 200), seconds_max=10)
        await agent.send(make_changeset(machine, Stamp(1, 1)))  # nobody applies it
        await agent.put_all(make_changeset(machine, Stamp(1, 2)))  # and it is not committed
        assert server.spooled(machine)
        await orders.assign(NODE, assignment(2, other))  # not assigned is not ended
        await become(lambda: answers(agent, 403), seconds_max=10)
        assert server.spooled(machine)
        await orders.assign(NODE, assignment(3, other, ended=(machine,)))
        await become(is_empty, seconds_max=10)
    server.kill()
    server.start()
    await orders.assign(NODE, assignment(4, machine))
    async with Agent(server, machine, tls) as agent:
        await become(lambda: answers(agent, 200), seconds_max=10)
        assert (await agent.state()).state.committed == Stamp(1, 1)


async def test_full_disk_is_told_and_waited_for_when_a_machine_has_ended(
    tmp_path: Path,
    small_disk: Path,
    certificates: Certificates,
    azurite: EmulatorProcess,
    orders: Orders,
) -> None:
    machine = uuid.uuid4()
    server = controlled_server(
        tmp_path, certificates, azurite, orders, spool=small_disk / "spool"
    ).start()
    ballast = small_disk / "ballast"
    try:
        await orders.assign(NODE, assignment(1, machine))
        async with Agent(server, machine, orders.machine_tls(machine)) as agent:
            await become(lambda: answers(agent, 200), seconds_max=10)
            await agent.send(make_changeset(machine, Stamp(1, 1)))
        fill(ballast)
        await orders.assign(NODE, assignment(2, ended=(machine,)))
        await become(lambda: told(server, f"end of {machine}"), seconds_max=10)
        server.kill()
        server.start()  # and it does not end either
        await become(lambda: told(server, f"end of {machine}"), seconds_max=10)
        ballast.unlink()
        await become(lambda: not server.spooled(machine), seconds_max=20)
        await become(lambda: not_told(server, f"end of {machine}"), seconds_max=10)
    finally:
        server.kill()


async def test_revoked_certificate_is_refused_on_open_connections_within_seconds(
    server: ProcessServer, orders: Orders
) -> None:
    machine = uuid.uuid4()
    await orders.assign(NODE, assignment(1, machine))
    server.start()
    tls, new = orders.machine_tls(machine), orders.machine_tls(machine)
    async with Agent(server, machine, tls) as agent:
        await become(lambda: answers(agent, 200), seconds_max=10)
        revoked_at = time.monotonic()
        await orders.assign(NODE, assignment(2, machine, revoked=(serial_of(tls),)))
        await become(lambda: answers(agent, 403), seconds_max=10)
        assert time.monotonic() - revoked_at < 10
        reply = await agent.put(make_changeset(machine, Stamp(1, 1)), 0)
        assert reply.told == (403, "revoked")
    async with Agent(server, machine, new) as renewed:
        assert (await renewed.state()).status == 200
        # A restart without the config server still knows.
        await orders.leave()
        server.kill()
        server.start()
    async with Agent(server, machine, tls) as agent:
        assert (await agent.state()).told == (403, "revoked")


async def test_certificates_of_other_nodes_open_no_stream(
    server: ProcessServer, orders: Orders
) -> None:
    machine = uuid.uuid4()
    await orders.assign(NODE, assignment(1, machine))
    server.start()
    for role in (NodeRole.PROCESS_SERVER, NodeRole.APPLIER):
        async with Agent(server, machine, orders.machine_tls(machine, role)) as agent:
            reply = await agent.state()
            assert reply.told == (403, "forbidden")
            assert role.value in reply.refusal.message


async def test_streams_go_on_without_the_config_server_and_it_is_told(
    server: ProcessServer, orders: Orders
) -> None:
    machine = uuid.uuid4()
    await orders.assign(NODE, assignment(1, machine))
    server.start()
    async with Agent(server, machine, orders.machine_tls(machine)) as agent:
        await become(lambda: answers(agent, 200), seconds_max=10)
        await agent.send(make_changeset(machine, Stamp(1, 1)))
        await become(lambda: has_stream(orders, machine), seconds_max=10)
        report = orders.reports[NODE]
        assert report["kind"] == "process-server"
        assert report["url"] == f"https://127.0.0.1:{server.port}"
        assert report["assignment"] == 1
        assert 0 < report["spool_bytes"] < report["spool_max_bytes"]
        assert report["free_bytes"] > 0
        await orders.leave()
        await become(lambda: told(server, "config server"), seconds_max=20)
        await agent.send(make_changeset(machine, Stamp(1, 2)))
        await orders.come_back()
        await become(lambda: not_told(server, "config server"), seconds_max=30)


async def test_certificate_is_renewed_under_an_open_listener(
    server: ProcessServer, orders: Orders, tmp_path: Path
) -> None:
    """Two thirds of its life are soon over; connections that are open go on."""
    machine = uuid.uuid4()
    folder = tmp_path / "identity"
    old = orders.identity(folder, NodeRole.PROCESS_SERVER, NODE, lifetime=timedelta(seconds=24))
    await orders.assign(NODE, assignment(1, machine))
    await orders.leave()
    server.start()
    tls = orders.machine_tls(machine)
    assert shown_serial(server, tls) == old.serial
    async with Agent(server, machine, tls) as agent:
        await agent.state()
        await orders.come_back()
        await become(lambda: shown_serial(server, tls) != old.serial, seconds_max=30)
        await become(lambda: answers(agent, 200), seconds_max=10)
        await agent.send(make_changeset(machine, Stamp(1, 1)))
    assert load(str(folder)).serial == shown_serial(server, tls)


def shown_serial(server: ProcessServer, tls: TlsFiles) -> str:
    """Of the certificate that a new connection is shown."""
    with (
        socket.create_connection(("127.0.0.1", server.port)) as plain,
        client_context(tls).wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        found = secured.getpeercert()
        assert found is not None
        return serial_text(str(found["serialNumber"]))


def has_stream(orders: Orders, machine: uuid.UUID) -> bool:
    streams = orders.reports.get(NODE, {}).get("streams", [])
    return any(
        one["machine"] == str(machine) and one["durable_ns"] and not one["backlog_bytes"]
        for one in streams
    )


async def answers(agent: Agent, status: int) -> bool:
    return (await agent.state()).status == status


async def told(server: ProcessServer, part: str) -> bool:
    return part in (await server.health())["warnings"]


async def not_told(server: ProcessServer, part: str) -> bool:
    return part not in (await server.health())["warnings"]


def test_configuration_names_one_authority(tmp_path: Path) -> None:
    base = f"""machines = []
[spool]
folder = "{tmp_path}"
[cache]
connection_string = "x"
"""
    tls = '[tls]\ncertificate = "a"\nkey = "b"\nca = "c"\n'
    control = '[control]\nconfig_server = "https://c"\nidentity_folder = "/i"\n'
    path = tmp_path / "process-server.toml"
    for text, says in (
        (base, "give either"),
        (base + tls + control, "give either"),
        (base.replace("[]", f'["{NODE}"]') + control, "the config server says who may send"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            Config.load(str(path), {})


def test_certificate_by_hand_needs_no_role_and_may_have_no_other() -> None:
    machine = uuid.uuid4()
    by_hand, from_control = Admission(None), Admission((machine,), from_control=True)
    plain = Shown((str(machine),), (), 7)
    by_hand.check(plain, machine)
    with pytest.raises(RefusedError, match="not of a machine"):
        from_control.check(plain, machine)
    for admission in (by_hand, from_control):
        admission.check(Shown((str(machine),), ("machine",), 7), machine)
        for shown in (
            Shown((str(machine),), ("applier",), 7),
            Shown((str(machine),), ("machine", "applier"), 7),
            Shown((str(machine), str(machine)), ("machine",), 7),
            Shown((), ("machine",), 7),
            Shown(),
        ):
            with pytest.raises(RefusedError) as told:
                admission.check(shown, machine)
            assert told.value.kind is Kind.FORBIDDEN

"""What a node remembers of its assignments, on a disk and against the real config server."""

import asyncio
import shutil
import stat
import uuid
from pathlib import Path

import pytest
from sqlalchemy import select

from appliance.config_server.administration import confirm_restored
from appliance.config_server.store.schema import AuditEntry, Machine, Node
from daemon.assignment_memory import FOLLOWED_FILE, HEALTH_PART, AssignmentMemory
from daemon.control_client import ControlClient
from daemon.identity import ASSIGNMENT_FILE
from daemon.service import Health
from replication.control.assignment import ApplierAssignment, MachineAssignment
from replication.control.memory import RESTORED_STEP, Followed
from replication.control.role import NodeRole
from tests.appliance.config_server.control import Control, open_control
from tests.daemon.test_control_client import bump, running, until

GONE = uuid.UUID(int=5)


def told(version: int) -> ApplierAssignment:
    """An assignment that destroys."""
    return ApplierAssignment(version=version, removed=(GONE,))


class Disk:
    """A node's folder, with what is read from it after each kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.health = Health()
        self.start()

    def start(self) -> None:
        self.memory = AssignmentMemory(str(self.folder), ApplierAssignment, self.health)

    def hear(self, version: int) -> bool:
        """Whether it was followed wholly."""
        kept = self.memory.take(told(version))
        self.memory.accept(kept)
        assert kept.version == version
        assert bool(self.health.warnings) is not bool(kept.removed)
        assert self.memory.is_older is not bool(kept.removed)
        return bool(kept.removed)


def test_what_was_followed_outlives_restarts(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    heard = []
    for version in (1, 40, 35, 41, 36 + RESTORED_STEP, 37 + RESTORED_STEP, 50):
        heard.append(disk.hear(version))
        disk.start()
        assert disk.memory.assignment is not None
        assert disk.memory.assignment.version == version
        assert disk.memory.is_older is not heard[-1]
    assert heard == [True, True, False, False, True, True, False]
    assert stat.S_IMODE((tmp_path / FOLLOWED_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("newer", [41, 35, 35 + RESTORED_STEP])
def test_killed_between_the_two_files_it_forgets_nothing(tmp_path: Path, newer: int) -> None:
    first, second = (
        (ASSIGNMENT_FILE, FOLLOWED_FILE)
        if newer > 40
        else (
            FOLLOWED_FILE,
            ASSIGNMENT_FILE,
        )
    )
    disk = Disk(tmp_path)
    disk.hear(40)
    if newer > 41:
        disk.hear(36)
    before = tmp_path / "before"
    shutil.copy(tmp_path / second, before)
    disk.hear(newer)
    assert (tmp_path / first).exists()
    before.replace(tmp_path / second)  # as if the second write had not come
    disk.start()
    if newer < 40:
        assert not disk.hear(39)
        assert not disk.hear(newer)
    else:
        assert not disk.health.warnings
        assert disk.hear(newer)


@pytest.mark.parametrize("left", ["", "{}", '{"highest": -1}', "\0"])
def test_a_damaged_file_leaves_what_the_assignment_tells(tmp_path: Path, left: str) -> None:
    disk = Disk(tmp_path)
    disk.hear(40)
    (tmp_path / FOLLOWED_FILE).write_text(left)
    disk.start()
    assert not disk.hear(35)
    (tmp_path / ASSIGNMENT_FILE).write_text(left)
    disk.start()
    assert disk.memory.assignment is None
    taken = disk.memory.take(told(36))
    assert taken.removed == ()
    disk.memory.accept(taken)
    assert disk.memory.is_older
    assert Followed.model_validate_json((tmp_path / FOLLOWED_FILE).read_bytes()).highest == 40


def is_protected(client: ControlClient[MachineAssignment]) -> bool:
    return client.assignment is not None and client.assignment.protected


async def remember(control: Control, node: uuid.UUID, state: str, version: int) -> None:
    """As the database of some time has it."""
    async with control.server.database.writing() as session:
        machine = await session.get(Machine, node)
        if machine is None:
            machine = Machine(id=node, name="web", state=state, since_ns=0)
            session.add(machine)
        machine.state = state
        (await session.get_one(Node, node)).assignment_version = version
        await session.flush()
        await control.server.nodes.bump(session, [node])


async def test_an_older_memory_ends_nothing_until_an_administrator_confirms_it(
    tmp_path: Path,
) -> None:
    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.MACHINE)
        await remember(control, identity.node, "protected", 39)
        client = control.client(identity, MachineAssignment)
        async with running(client):
            await until(lambda: client.version == 40)
            assert is_protected(client)
            assert HEALTH_PART not in control.health.criticals
            await remember(control, identity.node, "unprotected", 34)
            await until(lambda: client.version == 35)
            assert is_protected(client)
            assert "came after 40" in control.health.criticals[HEALTH_PART]
            for _ in range(7):
                await bump(control, identity.node)
            await until(lambda: client.version == 42)
            assert is_protected(client)

        again = control.client(identity, MachineAssignment)  # started anew
        again._stop = asyncio.Event()
        assert again.assignment == client.assignment
        control.health.criticals.clear()
        async with running(again):
            await bump(control, identity.node)
            await until(lambda: again.version == 43)
            assert is_protected(again)
            assert HEALTH_PART in control.health.criticals
            told = await confirm_restored(control.server.config)
            assert told.startswith("1 nodes follow this database wholly")
            await until(lambda: again.version == 43 + RESTORED_STEP)
            assert not is_protected(again)
            assert HEALTH_PART not in control.health.criticals
        async with control.server.database.reading() as session:
            entry = await session.scalar(
                select(AuditEntry).where(AuditEntry.action == "nodes.restored")
            )
        assert entry is not None
        assert entry.detail == {"nodes": 1}

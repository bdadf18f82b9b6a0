"""The rig behind its real HTTPS port, with its own CA, and nodes that really enrol.

Example::

    async with open_control(tmp_path) as control:
        identity = await control.enrol(NodeRole.APPLIER)
        async with control.client(identity.folder, ApplierAssignment) as client:
            ...
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from appliance.config_server.api.listener import listen
from appliance.config_server.config import ListenConfig
from appliance.config_server.identity.passphrase import read_passphrase
from appliance.config_server.server import Server
from daemon.control_client import ControlClient
from daemon.control_config import ControlConfig
from daemon.enrolment import enrol
from daemon.identity import NodeIdentity
from daemon.service import Health
from replication.control.assignment import NodeAssignment
from replication.control.enrolment import PassphraseKind
from replication.control.role import NodeRole
from tests.appliance.config_server.running import Rig, open_rig

A = TypeVar("A", bound=NodeAssignment)


@dataclass(slots=True)
class Control:
    """A config server on ``port``, and a folder for its nodes."""

    rig: Rig
    port: int
    folder: Path
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    health: Health = field(default_factory=Health)

    @property
    def server(self) -> Server:
        return self.rig.server

    def config(self, name: str = "", **changes: Any) -> ControlConfig:
        """A node's ``[control]`` section; its folder is ``name``'s."""
        tree = {
            "config_server": f"https://localhost:{self.port}",
            "identity_folder": str(self.folder / (name or uuid.uuid4().hex)),
            "report_seconds": 0.2,
            "wait_seconds": 5.0,
        }
        return ControlConfig.model_validate({**tree, **changes})

    async def passphrase(self, role: NodeRole = NodeRole.MACHINE) -> str:
        """The one that a node of ``role`` proves."""
        kind = PassphraseKind.of(role)
        async with self.server.database.reading() as session:
            found = await read_passphrase(session, self.server.identity.vault, kind)
        assert found is not None
        return found.text

    async def enrol(
        self,
        role: NodeRole,
        *,
        config: ControlConfig | None = None,
        passphrase: str | None = None,
        **options: Any,
    ) -> NodeIdentity:
        names = ("localhost", "127.0.0.1") if role is NodeRole.PROCESS_SERVER else ()
        config = config or self.config()
        folder = Path(config.identity_folder).name[:8]
        options = {"name": f"{role}-{folder}", "names": names, **options}
        return await enrol(config, passphrase or await self.passphrase(role), role, **options)

    def client(self, identity: NodeIdentity, kind: type[A], **changes: Any) -> ControlClient[A]:
        config = self.config(identity_folder=identity.folder, **changes)
        return ControlClient(config, kind, health=self.health, stop=self.stop)


@contextlib.asynccontextmanager
async def open_control(folder: Path, *, port: int = 0, **config: Any) -> AsyncIterator[Control]:
    """Serve with the state in ``folder``; the same folder again is the same config server."""
    async with open_rig(folder, **config) as rig:
        server = rig.server
        where = ListenConfig(host="127.0.0.1", port=port)
        context = server.identity.certificate.context
        async with listen(rig.app, context, where, server.config.limits) as number:
            control = Control(rig, number, folder)
            try:
                yield control
            finally:
                server.stop.set()
                control.stop.set()

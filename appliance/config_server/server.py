"""The config server in one piece: its parts, opened in order, and its life.

Conventions for who adds a part (`identity`, `discovery`, `protection`, `watching`):

- A part is opened by an async context manager that takes what it needs (`config`, `database`,
  `clock`, `health`, `registry`, other parts), never the whole Server. Add one line to
  ``open_server`` and one field to ``Server``.
- What runs all the time is an ``async def name(server: Server) -> None`` that ends when it is
  cancelled. Add it to ``BACKGROUND``. One that raises ends the daemon, and with it all that people
  and nodes ask for: so what comes round is done by ``rounds.go_round``, which tells the health
  what goes wrong, defects too, and tries again. A damaged database alone is raised.
- A long poll waits for its news or for ``server.stop``, whichever is first.
- ``server.clock()`` is the time: nanoseconds since 1970.
- Reads: ``async with server.database.reading() as session``. Changes that somebody asks for:
  ``async with server.change(caller, "policy.create", name) as session`` (one transaction together
  with its audit entry). Changes of our own: ``async with server.database.writing() as session``.
  Never one of them within another.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.limits import Attempts
from appliance.config_server.audit import DONE, Audit
from appliance.config_server.audit_pruning import keep_pruning
from appliance.config_server.caller import Caller
from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.discovery.power import VCenterPower
from appliance.config_server.discovery.service import Discovery, open_discovery
from appliance.config_server.identity.data_keys import KeyRates
from appliance.config_server.identity.identity import Identity, open_identity
from appliance.config_server.nodes.part import Nodes, open_nodes
from appliance.config_server.protection.instances import instance_id
from appliance.config_server.protection.part import (
    Protection,
    node_ports,
    nothing,
    open_protection,
)
from appliance.config_server.protection.workflows import WORKFLOWS
from appliance.config_server.recovery.actions.runner import ActionRunner
from appliance.config_server.recovery.drills.keeper import DrillKeeper
from appliance.config_server.recovery.part import Recovery
from appliance.config_server.recovery.ports import RecoveryPorts
from appliance.config_server.recovery.workflows import recovery_workflows
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.watching.part import Watching, open_watching
from daemon.durable import make_folder
from daemon.service import Health, Service
from replication.control.role import OperatorRole
from replication.errors import ReplicationError, StorageError, UnavailableError


@dataclass(frozen=True, slots=True)
class Server:
    """All that a route or a background task may reach.

    stop:     set when the daemon is to end.
    clock:    nanoseconds since 1970.
    attempts: sources that showed wrong tokens or proofs.
    key_rates: how often nodes ask for data keys.
    identity: keys, certificates, enrolment.
    nodes:    what they are told and what they said last.
    protection: policies, machines' states, durable jobs.
    recovery: what is over of failovers that no job is at work on.
    drills:   those that are due and those that are on.
    discovery: vCenters' readers.
    watching: health, RPO, events and measures.
    """

    config: ConfigServerConfig
    database: Database
    audit: Audit
    health: Health
    registry: CollectorRegistry
    stop: asyncio.Event
    identity: Identity
    nodes: Nodes
    protection: Protection
    recovery: Recovery
    drills: DrillKeeper
    discovery: Discovery
    watching: Watching
    key_rates: KeyRates
    clock: Callable[[], int] = time.time_ns
    attempts: Attempts = field(default_factory=Attempts)

    @contextlib.asynccontextmanager
    async def change(
        self,
        caller: Caller,
        action: str,
        target: str,
        detail: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[AsyncSession]:
        """One transaction for a change and its audit entry; neither is there without the other.

        An error of ours that is raised within is audited as well, as the outcome.
        action: noun and verb, as ``policy.create``. detail: never secrets.
        """
        try:
            async with self.database.writing() as session:
                yield session
                self.audit.add(session, caller, action, target, outcome=DONE, detail=detail)
        except (StorageError, UnavailableError):
            raise  # the audit entry could not be written either
        except ReplicationError as error:
            if isinstance(caller.role, OperatorRole):
                await self.audit.write(caller, action, target, outcome=error.code, detail=detail)
            else:  # a node that goes wrong, or is stolen, asks without end
                await self.audit.refused(caller, action, target, error.code)
            raise


async def _watch(server: Server) -> None:
    await server.watching.run()


async def _discover(server: Server) -> None:
    await server.discovery.run()


async def _look_after_failovers(server: Server) -> None:
    await server.recovery.run(server.health)


async def _look_after_drills(server: Server) -> None:
    await server.drills.run(server.health)


async def _prune_audit(server: Server) -> None:
    await keep_pruning(server.database, server.config.audit, server.health, server.clock)


async def _look_after_jobs(server: Server) -> None:
    await server.protection.look_after(server.health)


BACKGROUND: tuple[Callable[[Server], Coroutine[None, None, None]], ...] = (
    _watch,
    _discover,
    _look_after_jobs,
    _look_after_failovers,
    _look_after_drills,
    _prune_audit,
)
"""What runs beside the API, from the start to the end of the daemon."""


@contextlib.asynccontextmanager
async def open_server(
    config: ConfigServerConfig,
    service: Service,
    *,
    clock: Callable[[], int] = time.time_ns,
    boundary: Callable[[str], None] = nothing,
) -> AsyncIterator[Server]:
    """Open all parts; close them in reverse order. ``boundary``: see `open_protection`."""
    async with contextlib.AsyncExitStack() as stack:
        make_folder(config.state_folder)
        database = await stack.enter_async_context(
            open_database(config.database_url(), connections_max=config.database.connections_max)
        )
        names = config.listen.certificate_names()
        identity = await stack.enter_async_context(
            open_identity(config.identity, config.state_folder, names, database)
        )
        nodes = await stack.enter_async_context(open_nodes(database, clock))
        discovery = await stack.enter_async_context(
            open_discovery(
                database,
                identity.vault,
                service.health,
                clock,
                instance=instance_id(config.state_folder),
            )
        )
        recovery = recovery_workflows(
            RecoveryPorts(
                actions=ActionRunner(config.recovery, identity.vault),
                power=VCenterPower(database, identity.vault),
            ),
            answer_seconds_max=config.jobs.answer_seconds_max,
        )
        protection = await stack.enter_async_context(
            open_protection(
                database,
                node_ports(nodes, identity.vault, clock),
                state_folder=config.state_folder,
                database_url=config.database_url(),
                config=config.jobs,
                clock=clock,
                boundary=boundary,
                workflows={**WORKFLOWS, **recovery},
            )
        )
        watching = stack.enter_context(
            open_watching(
                config.watching,
                config.smtp,
                database=database,
                health=service.health,
                registry=service.registry,
                clock=clock,
                newest=nodes.book.newest,
            )
        )
        audit = Audit(database, clock)
        drills = DrillKeeper(
            database,
            protection.ports,
            audit,
            config.recovery,
            clock,
            protection.instance,
            protection.begin,
        )
        yield Server(
            config=config,
            database=database,
            audit=audit,
            health=service.health,
            registry=service.registry,
            stop=service.stop,
            identity=identity,
            nodes=nodes,
            protection=protection,
            recovery=Recovery(database, protection.ports, clock),
            drills=drills,
            discovery=discovery,
            watching=watching,
            key_rates=KeyRates(config.limits.data_keys_per_minute),
            clock=clock,
        )

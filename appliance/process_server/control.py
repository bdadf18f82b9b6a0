"""The process server under a config server: whose streams it takes, and what it says.

Without a config server, from static configuration, none of this runs. While the config server is
away, what it said last goes on to hold, also over a restart.

Source: docs/CONTROL.md §4, §5.
"""

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import AsyncIterator, Collection

from appliance.process_server.admission import Admission
from appliance.process_server.config import Config
from appliance.process_server.reporting import Reporter
from appliance.process_server.streams import Streams
from daemon.control_client import ControlClient
from daemon.control_config import ControlConfig
from daemon.identity import NodeIdentity
from daemon.identity import load as load_identity
from daemon.service import Health, Service
from daemon.tls import server_context
from replication.control.assignment import ProcessServerAssignment
from replication.control.report import ProcessServerReport
from replication.errors import StorageError

RETRY_SECONDS = 5.0
"""Between two attempts to let go of machines that have ended."""


def open_tls(config: Config) -> ssl.SSLContext:
    """The listener's certificates; ConfigError when there are none that can be used."""
    if config.control is not None:
        return server_context(load_identity(config.control.identity_folder).tls)
    assert config.tls is not None
    return server_context(config.tls)


def open_admission(config: Config) -> Admission:
    """Who may send: with a config server nobody, until it has said who."""
    if config.control is not None:
        return Admission((), from_control=True)
    return Admission(config.machines or None)


@contextlib.asynccontextmanager
async def controlled(
    config: ControlConfig, service: Service, admission: Admission, tls: ssl.SSLContext
) -> AsyncIterator[ControlClient[ProcessServerAssignment]]:
    """A client whose last assignment, from the disk, is followed already."""

    def renewed(identity: NodeIdentity) -> None:
        tls.load_cert_chain(identity.tls.certificate, identity.tls.key)
        tls.load_verify_locations(identity.tls.ca)

    async with ControlClient(
        config,
        ProcessServerAssignment,
        health=service.health,
        stop=service.stop,
        on_renewed=renewed,
    ) as control:
        if control.assignment is not None:
            admission.follow(control.assignment.machines, control.assignment.revoked)
        yield control


async def follow(
    control: ControlClient[ProcessServerAssignment],
    admission: Admission,
    streams: Streams,
    service: Service,
    url: str,
) -> None:
    """Do as the config server says, and tell it how it goes, until ``service.stop``."""
    reporter = Reporter(url, streams, service.health)
    endings = _Endings(control, streams, service.health)

    async def report() -> ProcessServerReport:
        return await reporter.report(control.version)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(control.run(report), name="control")
        ending = tasks.create_task(endings.carry_out(), name="endings")
        async for assignment in control.assignments():
            admission.follow(assignment.machines, assignment.revoked)
            endings.take(assignment.ended)
        ending.cancel()


class _Endings:
    """Lets go of the machines that have ended, again and again until all of it is done."""

    def __init__(
        self, control: ControlClient[ProcessServerAssignment], streams: Streams, health: Health
    ) -> None:
        self._control = control
        self._streams = streams
        self._health = health
        self._ended: frozenset[uuid.UUID] = frozenset()
        self._news = asyncio.Event()
        self._told: set[str] = set()

    def take(self, ended: Collection[uuid.UUID]) -> None:
        """From now on these have ended, and no others."""
        self._ended = frozenset(ended)
        self._news.set()

    async def carry_out(self) -> None:
        """Until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            done = await self._let_go()
            self._control.report_now()
            if not done:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_SECONDS):
                        await self._news.wait()
                self._news.set()

    async def _let_go(self) -> bool:
        """Whether all of it is done: a full disk may be in the way, for a while."""
        failed = {}
        for stream in self._streams.all:
            if stream.machine in self._ended:  # as it is said now, not when this began
                try:
                    await stream.end()
                except StorageError as error:
                    failed[f"end of {stream.machine}"] = str(error)
        for part in self._told | failed.keys():
            self._health.report(part, warning=failed.get(part, ""))
        self._told = set(failed)
        return not failed

"""A node's side of the control plane: what it is told, what it says, who it is.

    async with ControlClient(
        config.control, ApplierAssignment, health=service.health, stop=service.stop
    ) as control, asyncio.TaskGroup() as tasks:
        tasks.create_task(control.run(report))          # until ``stop``
        async for assignment in control.assignments():  # the one on disk first, then each newer
            follow(assignment)

The config server being away never stops a node: it starts from the assignment on its disk, goes on
by it, and says so in its health ("config server", a warning). Nothing here raises for it.

- A new assignment is on disk (mode 0600, by rename) before it is handed out; one of an older
  memory than what was followed without what destroys (`AssignmentMemory`).
- Reports go out every ``report_seconds`` and at once after ``report_now()``.
- The certificate is renewed at two thirds of its life; ``on_renewed`` then loads it into contexts
  that are in use (``context.load_cert_chain(files.certificate, files.key)``).
- ``data_key`` gives a machine's data key from the disk, or fetches it once.

Source: docs/CONTROL.md §3 to §5.
"""

import asyncio
import contextlib
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Generic, Self, TypeVar

import structlog

from daemon.assignment_memory import AssignmentMemory
from daemon.certificates import read_certificate, signing_request, utc_now
from daemon.control_call import ControlCalls, RefusedError, enrolled_context, parse
from daemon.control_config import ControlConfig
from daemon.data_key import read_data_key
from daemon.durable import make_folder, write_whole
from daemon.identity import (
    DATA_KEYS_FOLDER,
    NodeIdentity,
    NodeRecord,
    load,
    pending_key,
    take_certificate,
)
from daemon.service import Health
from replication.control.assignment import NodeAssignment
from replication.control.data_key import GivenDataKey
from replication.control.enrolment import Enrolled, RenewalRequest
from replication.control.recovery import Evidence, EvidenceKind, PointList
from replication.control.report import REPORT_BYTES_MAX, AnyReport, ReportAnswer
from replication.errors import ConfigError, PeerError, ReplicationError, StorageError

BACK_OFF_SECONDS_MIN = 0.5
BACK_OFF_SECONDS_MAX = 10.0
RENEWAL_LOOK_SECONDS = 60.0
RENEWAL_RETRY_SECONDS = 300.0
POLL_GRACE_SECONDS = 15.0
"""So much longer than asked for an answer to a long poll is waited for."""

HEALTH_PART = "config server"
_JITTER = 0.1

A = TypeVar("A", bound=NodeAssignment)
ReportProvider = Callable[[], Awaitable[AnyReport]]
"""Makes the whole report of now; called from the loop, one at a time."""


class ControlClient(Generic[A]):
    """Talks to the config server for one node, until its ``stop`` is set."""

    def __init__(
        self,
        config: ControlConfig,
        kind: type[A],
        *,
        health: Health,
        stop: asyncio.Event,
        on_renewed: Callable[[NodeIdentity], None] | None = None,
    ) -> None:
        """Read the identity and the last assignment from disk; no network.

        kind: which assignment this node gets, and by it the role that it must have.
        Raises ConfigError when nobody is enrolled in the folder, or another role is.
        """
        self._config = config
        self._kind = kind
        self._health = health
        self._stop = stop
        self._on_renewed = on_renewed
        self._identity = load(config.identity_folder)
        if self._identity.role is not kind.role:
            raise ConfigError(
                f"{config.identity_folder} is an identity of the role "
                f"{self._identity.role.value}, not {kind.role.value}",
                hint="give each daemon an identity folder of its own",
            )
        self._memory = AssignmentMemory(config.identity_folder, kind, health)
        self._changed = asyncio.Event()
        self._report_wanted = asyncio.Event()
        self._ended = False
        self._troubles: dict[str, str] = {}
        self._away_since: float | None = None
        self._reached = asyncio.Event()
        self._server_ahead_ns = 0
        self._calls: ControlCalls | None = None

    @property
    def identity(self) -> NodeIdentity:
        """Who this node is, by its newest certificate."""
        return self._identity

    @property
    def assignment(self) -> A | None:
        """The newest one; None for a node that never heard one."""
        return self._memory.assignment

    @property
    def is_older_memory(self) -> bool:
        """Whether ``assignment`` may have forgotten something: see `AssignmentMemory`."""
        return self._memory.is_older

    @property
    def version(self) -> int:
        """Of the newest assignment, for reports; 0 without one."""
        return self.assignment.version if self.assignment else 0

    @property
    def server_ahead_ns(self) -> int:
        """The config server's clock less ours, as the last report's answer told; 0 before."""
        return self._server_ahead_ns

    async def __aenter__(self) -> Self:
        self._calls = self._open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        if self._calls:
            await self._calls.close()

    async def assignments(self) -> AsyncIterator[A]:
        """The assignment on disk, if there is one, then each newer one; ends with ``run``.

        Who is slow gets the newest and misses those between: each is the whole.
        """
        given: A | None = None
        while not self._ended:
            if self.assignment is not None and self.assignment is not given:
                given = self.assignment
                yield given
            else:
                await self._changed.wait()

    async def run(self, report: ReportProvider) -> None:
        """Ask, report and renew until ``stop`` is set. Raises what ``report`` raises."""
        try:
            async with asyncio.TaskGroup() as group:
                loops = [
                    group.create_task(self._follow(), name="assignment"),
                    group.create_task(self._report(report), name="report"),
                    group.create_task(self._renew(), name="renewal"),
                ]
                await self._stop.wait()
                for loop in loops:
                    loop.cancel()
        finally:
            self._end()

    def report_now(self) -> None:
        """Let the next report go out at once."""
        self._report_wanted.set()

    def data_key_file(self, machine: uuid.UUID) -> str:
        """Where ``data_key`` keeps the machine's data key."""
        return os.path.join(self._config.identity_folder, DATA_KEYS_FOLDER, f"{machine}.key")

    async def data_key(self, machine: uuid.UUID) -> bytes:
        """The machine's data key, from the disk or from the config server.

        Raises UnavailableError while the config server is away, RefusedError when this node may
        not have it, StorageError, ConfigError when the file is damaged or others can read it.
        """
        path = self.data_key_file(machine)
        if await asyncio.to_thread(os.path.exists, path):
            return await asyncio.to_thread(read_data_key, path)
        key = await self.fetch_data_key(machine)
        await asyncio.to_thread(self.keep_data_key, machine, key)
        return key

    async def fetch_data_key(self, machine: uuid.UUID) -> bytes:
        """As the config server has it now, whatever is on the disk. Raises as ``data_key``."""
        answer = await self._connected.ask("GET", f"node/data-keys/{machine}")
        given = parse(GivenDataKey, answer, "data key")
        if given.machine != machine:
            raise PeerError(f"the data key of {given.machine} came for {machine}")
        return given.key()

    def keep_data_key(self, machine: uuid.UUID, key: bytes) -> None:
        """Write it to the disk, in the place of another one. Blocks; raises StorageError."""
        path = self.data_key_file(machine)
        make_folder(os.path.dirname(path))
        write_whole(path, f"{key.hex()}\n".encode())

    async def put_points(self, points: PointList) -> None:
        """Tell the recovery points of a machine. Raises as ``data_key`` does for the network."""
        await self._connected.ask("POST", "node/points", body=points)

    async def put_evidence(self, vm: uuid.UUID, kind: EvidenceKind, content: bytes) -> None:
        """Leave what a VM showed in the place of what was left before. Raises as ``put_points``."""
        body = Evidence.of(content)
        await self._connected.ask("POST", f"node/evidence/{vm}/{kind}", body=body)

    def forget_data_key(self, machine: uuid.UUID) -> None:
        """Remove it from the disk: the machine is not this node's any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.data_key_file(machine))

    @property
    def _connected(self) -> ControlCalls:
        assert self._calls is not None, "the client is used inside `async with`"
        return self._calls

    def _open(self) -> ControlCalls:
        return ControlCalls(self._config.config_server, enrolled_context(self._identity.tls))

    def _end(self) -> None:
        self._ended = True
        self._changed.set()

    async def _follow(self) -> None:
        """Ask for a newer assignment again and again."""
        failures = 0
        while True:
            try:
                # After a failure an answer is wanted at once: with it the trouble is over.
                newer = await self._ask_assignment(0 if failures else self._config.wait_seconds)
                if newer is not None:
                    newer = await asyncio.to_thread(self._memory.take, newer)
            except ReplicationError as error:
                self._trouble("assignment", error)
                await self._back_off(failures)
                failures += 1
                continue
            failures = 0
            self._trouble("assignment", None)
            if newer is not None:
                self._memory.accept(newer)
                changed, self._changed = self._changed, asyncio.Event()
                changed.set()

    async def _ask_assignment(self, wait_seconds: float) -> A | None:
        query = {"after": str(self.version), "wait_seconds": f"{wait_seconds:g}"}
        seconds_max = wait_seconds + POLL_GRACE_SECONDS
        answer = await self._connected.ask(
            "GET", "node/assignment", query=query, seconds_max=seconds_max
        )
        return None if answer is None else parse(self._kind, answer, "assignment")

    async def _report(self, provider: ReportProvider) -> None:
        failures = 0
        while True:
            self._report_wanted.clear()
            report = await provider()
            try:
                await self.tell(report)
            except ReplicationError as error:
                self._trouble("report", error)
                await self._back_off(failures)
                failures += 1
                continue
            failures = 0
            self._trouble("report", None)
            self._reached.set()  # whoever backs off tries again now
            self._reached.clear()
            period = self._config.report_seconds * random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period):
                    await self._report_wanted.wait()

    async def tell(self, report: AnyReport) -> None:
        """Send a report now; `run` does so by itself. Raises as ``data_key`` for the network."""
        size = len(report.model_dump_json())
        if size > REPORT_BYTES_MAX:
            raise PeerError(f"a report of {size} bytes is not sent, {REPORT_BYTES_MAX} are allowed")
        answer = parse(
            ReportAnswer,
            await self._connected.ask("POST", "node/reports", body=report),
            "answer to a report",
        )
        self._server_ahead_ns = answer.time_ns - time.time_ns()

    async def _renew(self) -> None:
        """Renew the certificate when two thirds of its life are over."""
        while True:
            left = (self._identity.renewal_due - utc_now()).total_seconds()
            if left > 0:
                await asyncio.sleep(min(left, RENEWAL_LOOK_SECONDS))
                continue
            try:
                old = await self._renew_now()
            except ReplicationError as error:
                self._trouble("renewal", error)
                await asyncio.sleep(min(RENEWAL_RETRY_SECONDS, self._config.report_seconds * 4))
                continue
            self._trouble("renewal", None)
            try:
                # The long poll that is under way ends by itself.
                await asyncio.sleep(self._config.wait_seconds + POLL_GRACE_SECONDS)
            finally:
                await old.close()

    async def _renew_now(self) -> ControlCalls:
        """Switch to a new certificate; returns the connections that show the old one."""
        folder = self._config.identity_folder
        identity = self._identity
        key = await asyncio.to_thread(pending_key, folder)
        body = RenewalRequest(csr_pem=signing_request(key, str(identity.node)).decode())
        answer = await self._connected.ask("POST", "node/certificate", body=body)
        enrolled = parse(Enrolled, answer, "certificate")
        certificate = read_certificate(enrolled.certificate_pem)
        ca = read_certificate(enrolled.ca_pem)
        record = NodeRecord(id=identity.node, role=identity.role, name=identity.name)
        self._identity = await asyncio.to_thread(take_certificate, folder, record, certificate, ca)
        old, self._calls = self._connected, self._open()
        structlog.get_logger().info("certificate renewed", expires=f"{self._identity.expires:%F}")
        if self._on_renewed:
            self._on_renewed(self._identity)
        return old

    async def _back_off(self, failures: int) -> None:
        """Wait longer each time, a random part of it, but not when the other loop got through."""
        longest = min(BACK_OFF_SECONDS_MAX, BACK_OFF_SECONDS_MIN * 2 ** min(failures, 10))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest * random.uniform(0.5, 1)):  # noqa: S311
                await self._reached.wait()

    def _trouble(self, loop: str, error: ReplicationError | None) -> None:
        """Tell in the health what does not work, and since when."""
        if error is None:
            self._troubles.pop(loop, None)
            if not self._troubles and self._away_since is not None:
                self._away_since = None
                structlog.get_logger().info("config server reached again")
        else:
            self._troubles[loop] = _describe(loop, error)
        if not self._troubles:
            self._health.report(HEALTH_PART)
            return
        if self._away_since is None:
            self._away_since = time.time()
            structlog.get_logger().warning("config server does not answer", reason=str(error))
        since = datetime.fromtimestamp(self._away_since, UTC)
        reasons = "; ".join(self._troubles.values())
        told = f"since {since:%Y-%m-%dT%H:%M:%SZ}: {reasons}"
        refused = isinstance(error, RefusedError) and error.status in (401, 403)
        if refused:
            self._health.report(HEALTH_PART, critical=f"the config server refuses us {told}")
        else:
            going_on = f"going on by assignment {self.version}"
            self._health.report(HEALTH_PART, warning=f"not well {told}; {going_on}")


def _describe(loop: str, error: ReplicationError) -> str:
    if isinstance(error, StorageError):
        return f"{loop}: {error}"
    if isinstance(error, RefusedError) and error.status in (401, 403):
        return f"{loop}: {error.args[0]}; enrol this node again (`enrol --again`)"
    return f"{loop}: {error.args[0]}"

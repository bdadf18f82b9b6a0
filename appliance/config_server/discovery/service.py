"""The readers of all vCenters: started, replaced and ended as the table of vCenters says.

Where several config servers share a database, each vCenter is read by one of them, which holds its
lease. A thread that is not wanted any more is left to end by itself: what it still says is not
listened to.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

import structlog
from sqlalchemy import select

from appliance.config_server.discovery.inventory import Change
from appliance.config_server.discovery.news import (
    Alive,
    Connected,
    Deliver,
    Delta,
    MistakenError,
    News,
    Refused,
    Snapshot,
    Unreachable,
    UnwantedError,
)
from appliance.config_server.discovery.record import (
    LEASE_SECONDS,
    LeaseLostError,
    Record,
    VCenterState,
    give_up_leases,
    take_lease,
)
from appliance.config_server.discovery.target import Target, Verify
from appliance.config_server.rounds import Trouble, apart, go_round
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import VCenter
from daemon.service import Health
from replication.errors import IntegrityError, ReplicationError

LOOK_SECONDS = 2.0
RENEW_SECONDS = LEASE_SECONDS / 3
DELIVERY_LOOK_SECONDS = 1.0
PASSWORD_TABLE = "vcenters"  # noqa: S105 - the place a password is sealed for
PART = "discovery"

_log = structlog.get_logger()


class Vault(Protocol):
    """What opens passwords. ``identity.vault_key.VaultKey`` is one."""

    def open(self, sealed: bytes, table: str, row: UUID | str) -> bytes: ...


@dataclass(slots=True)
class _Reader:
    """A vCenter that is being read by us."""

    target: Target
    record: Record
    stop: threading.Event = field(default_factory=threading.Event)
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)
    thread: threading.Thread | None = None

    @property
    def is_alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()


class Discovery:
    """Reads all vCenters of the table. ``instance``: who we are among several config servers."""

    def __init__(
        self,
        database: Database,
        vault: Vault,
        health: Health,
        clock: Callable[[], int],
        *,
        instance: str,
    ) -> None:
        self._database = database
        self._vault = vault
        self._health = health
        self._clock = clock
        self._instance = instance
        self._readers: dict[UUID, _Reader] = {}
        self._wake = asyncio.Event()

    def wake(self) -> None:
        """Look at the table at once: somebody has changed it."""
        self._wake.set()

    async def run(self) -> None:
        """Until it is cancelled. Raises IntegrityError for a damaged database."""
        await go_round(
            PART,
            self._look,
            self._health,
            LOOK_SECONDS,
            failing="looking after the vCenters",
            is_grave=False,
            wake=self._wake,
        )

    async def close(self) -> None:
        """End all readers and let others have their vCenters."""
        for reader in list(self._readers.values()):
            await self._end(reader)
        with contextlib.suppress(ReplicationError):  # the leases end by themselves
            async with self._database.writing() as session:
                await give_up_leases(session, self._instance)

    async def _look(self) -> list[Trouble]:
        async with self._database.reading() as session:
            rows = {row.id: row for row in await session.scalars(select(VCenter))}
        for reader in list(self._readers.values()):
            row = rows.get(reader.target.id)
            if (
                row is None
                or row.revision != reader.target.revision
                or row.reader != self._instance
                or not reader.is_alive
            ):
                await self._end(reader)
        troubles: list[Trouble] = []
        for row in rows.values():
            if row.state == VCenterState.REFUSED:
                continue  # until somebody changes the entry
            with apart(f"vCenter {row.name}", troubles):
                await self._look_after(row)
        return troubles

    async def _look_after(self, row: VCenter) -> None:
        now_ns = self._clock()
        is_ours = row.id in self._readers
        renewed_ns = row.reader_until_ns - int(LEASE_SECONDS * 1e9)
        if is_ours and now_ns - renewed_ns < RENEW_SECONDS * 1e9:
            return
        async with self._database.writing() as session:
            has_lease = await take_lease(session, row, self._instance, now_ns)
        if has_lease and not is_ours:
            await self._start(row)
        elif is_ours and not has_lease:
            await self._end(self._readers[row.id])

    async def _start(self, row: VCenter) -> None:
        record = Record(
            self._database,
            self._clock,
            vcenter=row.id,
            revision=row.revision,
            reader=self._instance,
        )
        try:
            target = target_of(row, self._vault)
        except IntegrityError as error:
            with contextlib.suppress(LeaseLostError):
                await record.set_state(VCenterState.REFUSED, str(error))
            return
        reader = self._readers[row.id] = _Reader(target, record)
        loop = asyncio.get_running_loop()
        reader.thread = threading.Thread(
            target=_read_forever,
            args=(target, lambda news: self._deliver(reader, news, loop), reader.stop),
            name=f"vcenter {row.name}",
            daemon=True,
        )
        reader.thread.start()

    async def _end(self, reader: _Reader) -> None:
        reader.stop.set()
        async with reader.busy:  # what is being written is written to its end
            if self._readers.get(reader.target.id) is reader:
                del self._readers[reader.target.id]

    def _deliver(self, reader: _Reader, news: News, loop: asyncio.AbstractEventLoop) -> None:
        """In the reader's thread: hand over to the loop, and wait until it is kept."""
        if reader.stop.is_set():
            raise UnwantedError
        taking = self._take(reader, news)
        try:
            future = asyncio.run_coroutine_threadsafe(taking, loop)
        except RuntimeError as error:  # the loop is closed: the daemon ends
            taking.close()
            raise UnwantedError from error
        while True:
            try:
                return future.result(DELIVERY_LOOK_SECONDS)
            except FutureTimeoutError:
                if future.done():
                    raise
                if reader.stop.is_set() and loop.is_closed():
                    raise UnwantedError from None
            except (FutureCancelledError, LeaseLostError) as error:
                raise UnwantedError from error

    async def _take(self, reader: _Reader, news: News) -> None:
        async with reader.busy:
            if reader.stop.is_set():
                raise UnwantedError
            record, name = reader.record, reader.target.name
            match news:
                case Connected(instance_uuid):
                    if reason := await record.set_instance(instance_uuid):
                        raise MistakenError(reason)
                case Snapshot(vms):
                    changes = await record.replace(vms)
                    await record.set_state(VCenterState.CONNECTED, seen_ns=self._clock())
                    _log.info("vCenter read", vcenter=name, vms=len(vms), **_counted(changes))
                case Delta(changed, removed):
                    _log.info(
                        "inventory changed",
                        vcenter=name,
                        **_counted(await record.apply(changed, removed)),
                    )
                case Alive():
                    await record.seen()
                case Unreachable(reason):
                    _log.warning("vCenter cannot be read", vcenter=name, reason=reason)
                    await record.set_state(VCenterState.UNREACHABLE, reason)
                case Refused(reason):
                    _log.warning("vCenter lets us not in", vcenter=name, reason=reason)
                    await record.set_state(VCenterState.REFUSED, reason)


def target_of(row: VCenter, vault: Vault) -> Target:
    """How the vCenter of that row is reached. IntegrityError when its password cannot be opened."""
    try:
        password = vault.open(row.password, PASSWORD_TABLE, row.id).decode()
    except (IntegrityError, UnicodeDecodeError) as error:
        raise IntegrityError("its password cannot be opened: set it anew") from error
    return Target(
        id=row.id,
        name=row.name,
        url=row.url,
        username=row.username,
        password=password,
        verify=Verify(row.verify),
        ca_pem=row.ca_pem,
        revision=row.revision,
        instance_uuid=row.instance_uuid,
    )


def _counted(changes: tuple[Change, ...]) -> dict[str, int]:
    """How many VMs had which kind of change."""
    counts: dict[str, int] = {}
    for change in changes:
        for kind in change.kinds:
            counts[kind.value] = counts.get(kind.value, 0) + 1
    return counts


def _read_forever(target: Target, deliver: Deliver, stop: threading.Event) -> None:
    """Loads pyvmomi's half second of code only where there is a vCenter to be read."""
    from appliance.config_server.discovery.reader import read_forever  # noqa: PLC0415

    read_forever(target, deliver, stop)


@contextlib.asynccontextmanager
async def open_discovery(
    database: Database,
    vault: Vault,
    health: Health,
    clock: Callable[[], int],
    *,
    instance: str,
) -> AsyncIterator[Discovery]:
    """Discovery as a part of the config server; ``run`` it beside the API."""
    discovery = Discovery(database, vault, health, clock, instance=instance)
    try:
        yield discovery
    finally:
        await discovery.close()

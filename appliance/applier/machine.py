"""One machine, from its changesets in the cache to its recovery points in the store.

One coroutine does all that touches the machine's store, one thing after another: look, apply,
audit, thin, scrub. What is applied is what the store's head says; everything else here may be
lost at any moment and is found again.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

import structlog

from appliance.applier.apply import Faults, LayerFiller, Opened, fill_layer, find_segments
from appliance.applier.asking import Asking
from appliance.applier.cache_account import CacheAccount
from appliance.applier.config import ApplierConfig, Machine
from appliance.applier.fetch import ByteWindow
from appliance.applier.inbox import Inbox
from appliance.applier.keeping import Keeping
from appliance.applier.lease import MachineLease, Ownership
from appliance.applier.metrics import ApplierMetrics
from appliance.applier.settled import settled
from appliance.applier.store.machine_store import MachineStore
from appliance.applier.succession import Gap
from appliance.applier.sums_publisher import SumsPublisher
from appliance.applier.watermark_blob import WatermarkBlob
from daemon.service import Health
from replication.bookmark import NOTHING, Stamp
from replication.cache_layout import container_last, manifest_name, sums_container
from replication.control.report import ResyncCause
from replication.errors import PeerError, ReplicationError, StorageError, UnavailableError
from replication.manifest import NO_BASIS
from replication.watermark import NO_ATTEMPT, Watermark, WatermarkKey

REOPEN_SECONDS = 10.0
"""Between two attempts to open a store that is locked or unusable."""

DROPS_MAX = 16
"""Containers dropped in one go."""

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Shared:
    """What all machines of a daemon have together.

    owner: the lease id of this applier.
    slots: changesets that may be applied at once.
    pool:  the threads that open frames.
    """

    config: ApplierConfig
    account: CacheAccount
    owner: uuid.UUID
    window: ByteWindow
    slots: asyncio.Semaphore
    pool: Executor
    health: Health
    metrics: ApplierMetrics


class MachineApplier:
    """Applies one machine until it is cancelled."""

    def __init__(self, shared: Shared, machine: Machine, data_key: bytes) -> None:
        self._shared = shared
        self._machine = machine
        self._part = f"machine {machine.name}"
        self._wake = asyncio.Event()
        self._lease = MachineLease(shared.account, machine.id, shared.owner, self._wake)
        self._inbox = Inbox(shared.account, machine.id, data_key, machine.data_key_file)
        self._data_key = data_key
        self._watermark = WatermarkBlob(shared.account)
        self._watermark_key = WatermarkKey(data_key, machine.id)
        self._sums: SumsPublisher | None = None
        self._asking = Asking(shared.config.reask_seconds, shared.config.gap_seconds_max)
        self._bad: dict[str, str] = {}
        self._malformed: dict[Stamp, str] = {}
        self._look_at = 0.0
        self._undropped = ""

    @property
    def id_text(self) -> str:
        """The machine's id as queue messages write it."""
        return str(self._machine.id)

    def wake(self) -> None:
        """Look for new manifests now."""
        self._look_at = 0.0
        self._wake.set()

    async def run(self) -> None:
        """Own the machine, whenever nobody else does, and apply it; until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._lease.keep(), name=f"lease of {self._machine.name}")
                while True:
                    await self._own()
                    await self._tend()
        finally:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._lease.release()

    async def _own(self) -> None:
        """Return when nobody else is known to own the machine."""
        while not (
            self._lease.ownership is Ownership.OURS
            or (self._lease.ownership is Ownership.UNKNOWN and not self._lease.reachable)
        ):
            taken = self._lease.ownership is Ownership.TAKEN
            self._count_lease()
            self._shared.health.report(
                self._part, warning="another applier owns the machine; waiting" if taken else ""
            )
            await self._pause(REOPEN_SECONDS)

    async def _tend(self) -> None:
        """Work on the store until the machine is lost to another applier or the store fails."""
        machine, shared = self._machine, self._shared
        try:
            store = await settled(
                MachineStore.open, shared.config.store, machine.id, name=machine.name
            )
        except UnavailableError as error:
            shared.health.report(self._part, warning=str(error))
            await self._pause(REOPEN_SECONDS)
            return
        except ReplicationError as error:
            shared.health.report(self._part, critical=f"the store cannot be opened: {error}")
            await self._pause(REOPEN_SECONDS)
            return
        keeping: Keeping | None = None
        try:
            keeping = Keeping(store, shared.config, shared.metrics, machine.name)
            self._sums = SumsPublisher(
                store,
                shared.account,
                machine.id,
                self._data_key,
                keeping=keeping,
                look_seconds=shared.config.sweep_seconds,
            )
            self._look_at = 0.0
            while self._lease.ownership is not Ownership.TAKEN:
                self._count_lease()
                if not await self._turn(store, keeping):
                    await self._pause(self._shared.config.sweep_seconds)
        except ReplicationError as error:
            _log.error("the store failed", machine=machine.name, error=str(error))
            shared.health.report(self._part, critical=str(error))
            await self._pause(REOPEN_SECONDS)
        finally:
            if keeping is not None:
                await keeping.close()
            await settled(store.close)

    async def _turn(self, store: MachineStore, keeping: Keeping) -> bool:
        """Do what is next; True when there may be more to do at once."""
        moved, warning = False, ""
        try:
            moved = await self._go_on(store, keeping)
            if not moved and self._sums is not None:
                moved = await self._sums.tend()
        except UnavailableError as error:
            warning = str(error)
        keeping.tend(busy=moved)
        await self._say(store, keeping)
        self._report(_head(store), keeping, warning)
        return moved

    async def _go_on(self, store: MachineStore, keeping: Keeping) -> bool:
        """Apply the next changeset if there is one."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + self._shared.config.sweep_seconds
            await self._inbox.look(_head(store))
            await self._watermark.refresh()
            await self._drop_applied(store)
        if self._asking.is_due(now):
            self._bad.clear()
            self._inbox.doubt()
            await self._watermark.say_again()
        found = await self._inbox.next(_head(store))
        for fault in self._inbox.take_faults():
            self._event(keeping, "manifest", fault.message)
        match found:
            case Opened():
                return await self._apply(store, keeping, found)
            case Gap(missing) if missing:
                self._asking.ask([manifest_name(stamp.number) for stamp in missing], now)
            case _:
                self._asking.settle()
        return False

    async def _apply(self, store: MachineStore, keeping: Keeping, opened: Opened) -> bool:
        manifest = opened.manifest
        if not manifest.resync and not keeping.resync.fits(manifest):
            return self._refuse_basis(keeping, manifest.stamp)
        found = await find_segments(self._shared.account, opened)
        still_bad = [
            name for name, version in found.versions.items() if self._bad.get(name) == version
        ]
        if found.missing or still_bad:
            self._asking.ask([*found.missing, *still_bad], time.monotonic())
            return False
        async with self._shared.slots:
            with await settled(store.begin) as writer:
                filler = LayerFiller(writer, manifest.disks)
                faults = await fill_layer(
                    self._shared.account, opened, filler, self._shared.window, self._shared.pool
                )
                if faults:
                    return self._refuse(keeping, opened, faults, found.versions)
                if self._lease.ownership is Ownership.TAKEN:
                    return False
                if manifest.resync:
                    await settled(keeping.resync.begin, manifest.stamp, manifest.attempt)
                try:
                    position = await settled(
                        writer.seal,
                        manifest.bookmark,
                        manifest.since,
                        manifest.attempt,
                        manifest.disks,
                    )
                except PeerError as error:
                    faults.malformed = str(error)
                    return self._refuse(keeping, opened, faults, found.versions)
        self._asking.settle()
        self._bad.clear()
        self._malformed.clear()
        self._inbox.forget(manifest.stamp)
        self._count_applied(opened)
        keeping.take_note(manifest.bookmark)
        await self._say(store, keeping)
        await keeping.check(position, manifest)
        _log.debug("applied", machine=self._machine.name, changeset=str(manifest.stamp))
        return True

    def _refuse_basis(self, keeping: Keeping, stamp: Stamp) -> bool:
        why = "its source has compared with another state than this store's"
        self._event(keeping, "basis", f"changeset {stamp}: {why}")
        self._malformed[stamp] = why
        self._inbox.refuse(stamp, why)
        return True

    def _refuse(
        self, keeping: Keeping, opened: Opened, faults: Faults, versions: Mapping[str, str]
    ) -> bool:
        """Say what is wrong with a changeset; True when another one may be tried at once."""
        stamp = opened.manifest.stamp
        for name, message in faults.damaged.items():
            self._bad[name] = versions.get(name, "")
            self._event(keeping, "segment", f"{opened.container}/{name}: {message}")
        if faults.malformed:
            self._event(keeping, "malformed", f"changeset {stamp}: {faults.malformed}")
            self._malformed[stamp] = faults.malformed
            self._inbox.refuse(stamp, f"its segments are malformed: {faults.malformed}")
            return True
        self._asking.ask([*faults.missing, *faults.damaged], time.monotonic())
        return False

    async def _say(self, store: MachineStore, keeping: Keeping) -> None:
        """Publish the watermark; what the cache does not take is said again later."""
        head = store.head
        lost = self._lost(keeping)
        cause = ResyncCause.INTEGRITY if lost == keeping.lost else ResyncCause.STREAM_LOST
        await self._watermark.say(
            Watermark(
                machine=self._machine.id,
                applied=head.stamp if head else NOTHING,
                attempt=head.attempt if head else NO_ATTEMPT,
                restorable_ns=keeping.restorable_ns,
                wanted=self._asking.names,
                repair=keeping.repair,
                lost=lost,
                lost_generation=max(self._inbox.authentic, _head(store)).generation if lost else 0,
                lost_cause=cause.value if lost else "",
                sums=self._sums.basis if self._sums is not None else NO_BASIS,
            ).signed(self._watermark_key)
        )

    def _lost(self, keeping: Keeping) -> str:
        if self._malformed and self._asking.names:
            stamp, why = next(iter(self._malformed.items()))
            return f"changeset {stamp} is authentic and cannot be applied: {why}"
        if self._asking.is_in_vain(time.monotonic()):
            names = ", ".join(self._asking.names[:3])
            return f"{names} did not come for {self._shared.config.gap_seconds_max:.0f} s"
        return keeping.lost

    async def _drop_applied(self, store: MachineStore) -> None:
        """Drop containers that nothing more can come into; what waits is not among them."""
        head = _head(store)
        if not self._watermark.is_put:
            return
        passed = [
            name
            for name in self._inbox.containers
            if (last := container_last(name)) is not None and last < head
        ]
        needed = self._sums is not None and self._sums.is_needed
        passed += [
            sums_container(self._machine.id, generation)
            for generation in self._inbox.sums
            if generation < head.generation or (generation == head.generation and not needed)
        ]
        self._undropped = ""
        for name in passed[:DROPS_MAX]:
            try:
                await self._shared.account.drop(name)
            except StorageError as error:  # a lease or a policy: applying goes on all the same
                self._undropped = str(error)

    def _event(self, keeping: Keeping, code: str, message: str) -> None:
        keeping.tell(code, message)
        _log.error("integrity", machine=self._machine.name, code=code, what=message)

    def _report(self, head: Stamp, keeping: Keeping, warning: str) -> None:
        lost = self._lost(keeping)
        told = [trouble for trouble in (warning, self._undropped) if trouble]
        if not (warning or self._watermark.is_put):
            told.append("the cache does not take the watermark: what is applied cannot be told")
        if self._asking.names:
            faults = f"; {keeping.newest_event}" if keeping.newest_event else ""
            told.append(f"waiting for {len(self._asking.names)} blobs to be put again{faults}")
        if self._inbox.passed_over:
            told.append(f"{self._inbox.passed_over} containers more wait than are looked at once")
        if keeping.repair.runs:
            told.append(f"{len(keeping.repair.runs)} runs of blocks need repair by the source")
        self._shared.health.report(
            self._part,
            warning="; ".join(told),
            critical=f"only a new generation helps: {lost}" if lost else "",
        )
        name, metrics = self._machine.name, self._shared.metrics
        metrics.wanted_blobs.labels(name).set(len(self._asking.names))
        newest = self._inbox.newest
        behind = newest.number - (head.number if newest.generation == head.generation else 0)
        metrics.lag_changesets.labels(name).set(behind if newest > head else 0)

    def _count_applied(self, opened: Opened) -> None:
        name, metrics = self._machine.name, self._shared.metrics
        metrics.changesets.labels(name).inc()
        metrics.sent_bytes.labels(name).inc(opened.manifest.sent_bytes)
        metrics.changed_bytes.labels(name).inc(opened.manifest.changed_bytes)

    def _count_lease(self) -> None:
        held = self._lease.ownership is Ownership.OURS
        self._shared.metrics.lease_held.labels(self._machine.name).set(held)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()


def _head(store: MachineStore) -> Stamp:
    return store.head.stamp if store.head else NOTHING

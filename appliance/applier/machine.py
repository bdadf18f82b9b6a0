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

import structlog

from appliance.applier.apply import Faults, Found, LayerFiller, Opened, fill_layer, find_segments
from appliance.applier.asking import Asking
from appliance.applier.holding import Answer
from appliance.applier.inbox import Inbox
from appliance.applier.keeping import Keeping
from appliance.applier.lease import MachineLease, Ownership
from appliance.applier.measure import exceeded
from appliance.applier.settled import settled
from appliance.applier.shared import Shared
from appliance.applier.store.machine_store import MachineStore
from appliance.applier.succession import Gap
from appliance.applier.sums_publisher import SumsPublisher
from appliance.applier.target import Target
from appliance.applier.watermark_blob import WatermarkBlob
from replication.bookmark import NOTHING, Stamp
from replication.cache_layout import manifest_name
from replication.control.report import ResyncCause
from replication.errors import PeerError, ReplicationError, StorageError, UnavailableError
from replication.manifest import NO_BASIS
from replication.watermark import NO_ATTEMPT, Watermark, WatermarkKey

REOPEN_SECONDS = 10.0
"""Between two attempts to open a store that is locked or unusable."""

DROPS_MAX = 16
"""Containers dropped in one go."""

_log = structlog.get_logger()


class MachineApplier:
    """Applies one machine until it is cancelled.

    inbox:        what waits for it.
    lost:         why only a resync helps; empty while none is needed.
    open_repairs: runs of blocks that the source must send again, asked for or by a resync.
    """

    def __init__(self, shared: Shared, target: Target) -> None:
        self._shared = shared
        self._target = target
        self._wake = asyncio.Event()
        self._lease = MachineLease(shared.account, target.id, shared.owner, self._wake)
        self.inbox = Inbox(shared.account, target.id, target.data_key, target.key_source)
        self._watermark = WatermarkBlob(shared.account)
        self._watermark_key = WatermarkKey(target.data_key, target.id)
        self.lost = ""
        self.open_repairs = 0
        self._keeping: Keeping | None = None
        self._sums: SumsPublisher | None = None
        self._asking = Asking(shared.config.reask_seconds, shared.config.gap_seconds_max)
        self._bad: dict[str, str] = {}
        self._malformed: dict[Stamp, str] = {}
        self._look_at = 0.0
        self._undropped = ""
        self._too_large = ""

    @property
    def id_text(self) -> str:
        """The machine's id as queue messages write it."""
        return str(self._target.id)

    @property
    def target(self) -> Target:
        return self._target

    @property
    def part(self) -> str:
        """The part of the daemon's health that tells of the machine."""
        return f"machine {self._target.name}"

    @property
    def answers(self) -> Mapping[uuid.UUID, Answer] | None:
        """What became of its holds; None while its store is not open."""
        return self._keeping.answers if self._keeping is not None else None

    def follow(self, target: Target) -> None:
        """Go on as ``target`` says, which is the same machine with the same data key."""
        assert (target.id, target.data_key) == (self._target.id, self._target.data_key)
        if target.name != self._target.name:
            self.leave()
        self._target = target
        if self._keeping is not None:
            self._keeping.look_at_holds()
        self.wake()

    def leave(self) -> None:
        """Say nothing more of the machine: it has another name now, or it is gone."""
        self._shared.health.report(self.part)
        self._shared.metrics.forget(self._target.name)

    def wake(self) -> None:
        """Look for new manifests now."""
        self._look_at = 0.0
        self._wake.set()

    async def run(self) -> None:
        """Own the machine, whenever nobody else does, and apply it; until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._lease.keep(), name=f"lease of {self._target.name}")
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
                self.part, warning="another applier owns the machine; waiting" if taken else ""
            )
            await self._pause(REOPEN_SECONDS)

    async def _tend(self) -> None:
        """Work on the store until the machine is lost to another applier or the store fails."""
        machine, shared = self._target, self._shared
        try:
            store = await settled(
                MachineStore.open, shared.config.store, machine.id, name=machine.name
            )
        except UnavailableError as error:
            shared.health.report(self.part, warning=str(error))
            await self._pause(REOPEN_SECONDS)
            return
        except ReplicationError as error:
            shared.health.report(self.part, critical=f"the store cannot be opened: {error}")
            await self._pause(REOPEN_SECONDS)
            return
        try:
            keeping = self._keeping = Keeping(
                store, shared.config, shared.metrics, lambda: self._target, shared.report_now
            )
            self._sums = SumsPublisher(
                store,
                shared.account,
                machine.id,
                machine.data_key,
                keeping=keeping,
                look_seconds=shared.config.sweep_seconds,
            )
            self._look_at, named = 0.0, ""
            while self._lease.ownership is not Ownership.TAKEN:
                self._count_lease()
                if named != self._target.name:
                    named = self._target.name
                    await settled(store.rename, named)
                if not await self._turn(store, keeping):
                    await self._pause(self._shared.config.sweep_seconds)
        except ReplicationError as error:
            _log.error("the store failed", machine=machine.name, error=str(error))
            shared.health.report(self.part, critical=str(error))
            await self._pause(REOPEN_SECONDS)
        finally:
            closing, self._keeping = self._keeping, None
            if closing is not None:
                await closing.close()
            await settled(store.close)

    async def _turn(self, store: MachineStore, keeping: Keeping) -> bool:
        """Do what is next; True when there may be more to do at once."""
        moved, warning = False, ""
        try:
            if self._target.apply:
                moved = await self._go_on(store, keeping)
                if not moved and self._sums is not None:
                    moved = await self._sums.tend()
            else:
                self._asking.settle()
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
            await self.inbox.look(_head(store))
            await self._watermark.refresh()
            await self._drop_applied(store)
        if self._asking.is_due(now):
            self._bad.clear()
            self.inbox.doubt()
            await self._watermark.say_again()
        lacking: dict[Stamp, list[str]] = {}
        while True:
            found = await self.inbox.next(_head(store), lacking)
            for fault in self.inbox.take_faults():
                self._event(keeping, "manifest", fault.message)
            match found:
                case Opened():
                    segments = await find_segments(self._shared.account, found)
                    missing = self._missing(segments)
                    if not missing:
                        return await self._apply(store, keeping, found, segments.versions)
                    # It is asked for. What does not come may be lost everywhere, and then its
                    # source sends all of it again in a later changeset.
                    lacking[found.manifest.stamp] = missing
                    if self._asking.seconds(now) >= self._shared.config.reask_seconds:
                        continue
                case Gap(absent) if absent and not lacking:
                    self._asking.ask([manifest_name(stamp.number) for stamp in absent], now)
                    return False
            break
        if lacking:
            self._asking.ask([name for names in lacking.values() for name in names], now)
        else:
            self._asking.settle()
        return False

    def _missing(self, found: Found) -> list[str]:
        """Segments that are not there, or still are what could not be used."""
        versions = found.versions.items()
        bad = [name for name, version in versions if self._bad.get(name) == version]
        return [*found.missing, *bad]

    async def _apply(
        self,
        store: MachineStore,
        keeping: Keeping,
        opened: Opened,
        versions: Mapping[str, str],
    ) -> bool:
        manifest = opened.manifest
        self._too_large = await settled(exceeded, self._shared.config, store.folder, manifest.disks)
        if self._too_large:
            return False
        if not manifest.resync and not keeping.resync.fits(manifest, _head(store)):
            return self._refuse_basis(keeping, manifest.stamp)
        async with self._shared.slots:
            with await settled(store.begin) as writer:
                filler = LayerFiller(writer, manifest.disks)
                faults = await fill_layer(
                    self._shared.account, opened, filler, self._shared.window, self._shared.pool
                )
                if faults:
                    return self._refuse(keeping, opened, faults, versions)
                if self._lease.ownership is Ownership.TAKEN:
                    return False
                if manifest.resync:
                    await settled(keeping.resync.begin, manifest.stamp, manifest.attempt)
                else:
                    await settled(keeping.resync.note_origin, manifest, _head(store))
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
                    return self._refuse(keeping, opened, faults, versions)
        self._asking.settle()
        self._bad.clear()
        self._malformed.clear()
        self.inbox.forget(manifest.stamp)
        self._shared.metrics.count_applied(self._target.name, manifest)
        keeping.take_note(manifest.bookmark)
        await self._say(store, keeping)
        await keeping.check(position, manifest)
        _log.debug("applied", machine=self._target.name, changeset=str(manifest.stamp))
        return True

    def _refuse_basis(self, keeping: Keeping, stamp: Stamp) -> bool:
        why = "its source counts from another state than this store's"
        self._event(keeping, "basis", f"changeset {stamp}: {why}")
        self._malformed[stamp] = why
        self.inbox.refuse(stamp, why)
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
            self.inbox.refuse(stamp, f"its segments are malformed: {faults.malformed}")
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
                machine=self._target.id,
                applied=head.stamp if head else NOTHING,
                attempt=head.attempt if head else NO_ATTEMPT,
                restorable_ns=keeping.restorable_ns,
                wanted=self._asking.names,
                repair=keeping.repair,
                lost=lost,
                lost_generation=max(self.inbox.authentic, _head(store)).generation if lost else 0,
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
        needed = self._sums is not None and self._sums.is_needed
        self._undropped = ""
        for name in self.inbox.passed(head, sums_are_needed=needed)[:DROPS_MAX]:
            try:
                await self._shared.account.drop(name)
            except StorageError as error:  # a lease or a policy: applying goes on all the same
                self._undropped = str(error)

    def _event(self, keeping: Keeping, code: str, message: str) -> None:
        keeping.tell(code, message)
        _log.error("integrity", machine=self._target.name, code=code, what=message)

    def _report(self, head: Stamp, keeping: Keeping, warning: str) -> None:
        self.lost = self._lost(keeping)
        self.open_repairs = keeping.open_repairs
        told = [trouble for trouble in (warning, self._undropped) if trouble]
        if not (warning or self._watermark.is_put):
            told.append("the cache does not take the watermark: what is applied cannot be told")
        if self._asking.names:
            faults = f"; {keeping.newest_event}" if keeping.newest_event else ""
            told.append(f"waiting for {len(self._asking.names)} blobs to be put again{faults}")
        if self.inbox.passed_over:
            told.append(f"{self.inbox.passed_over} containers more wait than are looked at once")
        if self.open_repairs:
            told.append(f"{self.open_repairs} runs of blocks need repair by the source")
        self._shared.health.report(
            self.part,
            warning="; ".join(told),
            critical=f"only a resync helps: {self.lost}" if self.lost else self._too_large,
        )
        wanted, newest = len(self._asking.names), self.inbox.newest
        name = self._target.name
        self._shared.metrics.tell_waiting(name, wanted=wanted, newest=newest, head=head)

    def _count_lease(self) -> None:
        held = self._lease.ownership is Ownership.OURS
        self._shared.metrics.lease_held.labels(self._target.name).set(held)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()


def _head(store: MachineStore) -> Stamp:
    return store.head.stamp if store.head else NOTHING

"""What a machine's store needs beside changesets: audits, repairs, holds, thinning, a slow scrub.

All bounded and second to applying: thinning and scrub go on in the background. So do holds, which
must not wait for a cache that does not answer. What is found wrong
goes into ``events.jsonl`` and ``repair.json`` of the machine's folder before anybody is told.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from appliance.applier.arrivals import Arrivals
from appliance.applier.audit import Finding, audit_chunks, find_unreadable, read_blocks
from appliance.applier.config import ApplierConfig
from appliance.applier.event_record import EventRecord
from appliance.applier.holding import Answer, Holder
from appliance.applier.metrics import ApplierMetrics
from appliance.applier.repair_book import RepairBook
from appliance.applier.resync_record import ResyncRecord
from appliance.applier.scrub import SLICE_BYTES_MAX, Scrub
from appliance.applier.settled import settled
from appliance.applier.store.machine_store import MachineStore
from appliance.applier.store.reports import drop_reports, read_reports
from appliance.applier.target import Target
from replication.bookmark import Bookmark, Stamp
from replication.errors import IntegrityError
from replication.manifest import Manifest
from replication.watermark import Repair, RepairRun

if TYPE_CHECKING:
    from appliance.applier.store.model import Damage

BUSY_SECONDS = 60.0
"""Between two rounds while changesets come one after another."""

IDLE_SECONDS = 2.0
HOLD_SECONDS = 5.0
"""Between two looks at holds when nothing has changed: for locks that end."""

LONG_AUDIT_SECONDS = 0.5
AUDIT_SHARE = 0.1
"""Audits that take long (a view of many layers) get this much of the time, not more."""

THIN_BYTES_MAX = 256 << 20
"""Merged and folded in one round: what a stopping applier may have to wait for."""

HEALS_MAX = 1024
"""Damaged places that are looked at after a repair."""

_NS = 1_000_000_000


class Keeping:
    """One open store's keeper."""

    def __init__(
        self,
        store: MachineStore,
        config: ApplierConfig,
        metrics: ApplierMetrics,
        target: Callable[[], Target],
        on_answer: Callable[[], None],
    ) -> None:
        """target:    the machine, as it is wanted whenever it is asked for.
        on_answer: called when something became of a hold.
        """
        self._store = store
        self._config = config
        self._metrics = metrics
        self._target = target
        self._events = EventRecord(store.folder)
        self._book = RepairBook(store.folder)
        self._book.ask_again()
        self._arrivals = Arrivals()
        self._arrivals.keep(self._book.open_runs)
        self.resync = ResyncRecord(store.folder)
        self._scrub = Scrub()
        self._background: asyncio.Task[None] | None = None
        self._tended_at = 0.0
        self._audit_at = 0.0
        self._scrubbed_at = time.monotonic()
        self._restorable_ns = max(
            (
                point.bookmark.time_ns
                for point in store.points()
                if point.bookmark.consistency.restorable
            ),
            default=0,
        )
        self._count()
        self._holder = Holder(store)
        self._on_answer = on_answer
        self._news = asyncio.Event()
        self._holding = asyncio.create_task(self._hold(), name=f"holds of {target().name}")

    @property
    def answers(self) -> Mapping[uuid.UUID, Answer]:
        """What became of the holds that are wished for."""
        return self._holder.answers

    def look_at_holds(self) -> None:
        """Others may be wished for now, or there may be another point."""
        self._news.set()

    @property
    def restorable_ns(self) -> int:
        """Time of the newest recovery point, 0 for none."""
        return self._restorable_ns

    @property
    def repair(self) -> Repair:
        return self._book.repair

    @property
    def open_repairs(self) -> int:
        """Runs of blocks that are known to be wrong, also when only a resync brings them."""
        return len(self._book.open_runs)

    @property
    def lost(self) -> str:
        """Why only a resync helps, or empty; not while one is under way that brings it all."""
        head = self._store.head
        begun = self.resync.find(head.stamp.generation) if head else None
        return "" if begun is not None and not begun.settled else self._book.lost

    def damaged(self) -> tuple[RepairRun, ...]:
        """All blocks that are known to be wrong or unreadable here."""
        return (
            *self._book.open_runs,
            *(
                RepairRun(damage.disk, damage.block, 1)
                for damage in self._store.damages()
                if damage.disk >= 0
            ),
        )

    @property
    def newest_event(self) -> str:
        """The message of the newest event, or empty."""
        return self._events.events[-1].message if self._events.events else ""

    def tell(self, code: str, message: str) -> None:
        """Record an integrity event."""
        self._events.tell(time.time_ns(), code, message)
        self._metrics.integrity_events.labels(self._target().name).inc()

    def take_note(self, bookmark: Bookmark) -> None:
        """A changeset with this bookmark was sealed."""
        if bookmark.consistency.restorable:
            self._restorable_ns = bookmark.time_ns
        self.look_at_holds()

    async def check(self, position: int, manifest: Manifest) -> None:
        """After a changeset was sealed: is it, with all below it, what the source had?"""
        self._book.fit(manifest.disks)
        begun = self.resync.find(manifest.stamp.generation)
        if manifest.since == 0 and not manifest.resync:
            runs = self._book.open_runs  # all blocks come
        else:
            runs = self._book.fulfilled(manifest.repaired)
        settles = begun is not None and not begun.settled and _is_comparable(manifest)
        sent: frozenset[RepairRun] = frozenset()
        if settles and begun is not None:
            # Whatever its sums called different has been sent by now.
            sent = frozenset(begun.runs or ()) & frozenset(self._book.open_runs)
            runs = tuple({*runs, *sent})
        astray: tuple[RepairRun, ...] = ()
        if self._book.open_runs:
            came = await self._take_arrivals(position)
            if sent and begun is not None:
                came |= await settled(self._brought_since, begun.stamp, sent)
            astray = tuple(run for run in runs if run not in came)
            runs = tuple(run for run in runs if run in came)
        findings = await settled(self._check, position, manifest, runs)
        self._take(findings, closing=runs)
        if astray:
            self._book.ask_again(astray)
            self._arrivals.expect(astray)
        if settles and begun is not None:
            self.resync.settle(begun)
        self._count()

    def tend(self, *, busy: bool) -> None:
        """Thin and scrub in the background, if it is time; raise what the last time failed of."""
        if self._holding.done():
            self._holding.result()
        if self._background is not None:
            if not self._background.done():
                return
            self._background.result()
        now = time.monotonic()
        if now >= self._tended_at + (BUSY_SECONDS if busy else IDLE_SECONDS):
            self._tended_at = now
            self._background = asyncio.create_task(
                self._tend(now), name=f"keeping {self._target().name}"
            )

    async def close(self) -> None:
        """Return when nothing works on the store in the background any more."""
        tasks = [task for task in (self._holding, self._background) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    async def _hold(self) -> None:
        """Carry out what is wished for, until cancelled."""
        while True:
            self._news.clear()
            wish = self._target().wish
            if (
                wish is not None
                and not self._holder.is_settled(wish)
                and await settled(self._holder.tend, wish, time.time_ns())
            ):
                self._on_answer()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HOLD_SECONDS):
                    await self._news.wait()

    async def _tend(self, now: float) -> None:
        target = self._target()
        if target.keep and not self._awaits_resync():
            await settled(
                self._store.thin, time.time_ns(), target.retention, bytes_max=THIN_BYTES_MAX
            )
        await self._take_reports()
        rate = self._config.scrub_bytes_per_second
        earned = min(SLICE_BYTES_MAX, int(rate * (now - self._scrubbed_at)))
        self._scrubbed_at = now
        if earned and self.restorable_ns:  # without a point there is nothing yet to look after
            done_bytes, findings = await settled(self._scrub.run, self._store, earned)
            self._metrics.scrubbed_bytes.labels(self._target().name).inc(done_bytes)
            self._take(findings)
            self._count()

    def _awaits_resync(self) -> bool:
        """Whether the layers of a resync have yet to tell what of the damage it has mended.

        No newer point can be restored meanwhile, so there is next to nothing to thin.
        """
        head = self._store.head
        begun = self.resync.find(head.stamp.generation) if head else None
        return begun is not None and not begun.settled and self.open_repairs > 0

    async def _take_reports(self) -> None:
        """Ask for what readers have found damaged, if it is so at the head."""
        head = self._store.head
        paths, runs = await settled(read_reports, self._store.folder)
        if not paths or head is None:
            return
        disks = {disk.index for disk in self._store.chain().points[-1].disks}
        here = [run for run in runs if run.disk in disks]
        self._take(await settled(find_unreadable, self._store, head.position, here))
        await settled(drop_reports, paths)  # not before the book has them
        self._count()

    async def _take_arrivals(self, position: int) -> frozenset[RepairRun]:
        """Note what the layer that ends at ``position`` brought; the open runs that are whole.

        It counts for what was expected before: a scrub may find more while it is read.
        """
        expected = self._arrivals.expected
        for disk, extents in (await settled(self._store.extents_at, position)).items():
            self._arrivals.take(disk, extents, expected)
        return frozenset(run for run in self._book.open_runs if self._arrivals.have_come(run))

    def _brought_since(self, begun: Stamp, runs: Iterable[RepairRun]) -> frozenset[RepairRun]:
        """Which of ``runs`` the layers after the changeset ``begun`` hold wholly.

        What is remembered of arrivals ends with the daemon; a resync may outlast it.
        """
        chain = self._store.chain()
        first = next((p.position for p in chain.points if p.bookmark.stamp == begun), None)
        if first is None:
            return frozenset()
        arrivals = Arrivals()
        arrivals.expect(runs)
        for row in chain.layers:
            if row.first > first:
                for disk, extents in self._store.extents_at(row.last).items():
                    arrivals.take(disk, extents)
        return frozenset(run for run in arrivals.expected if arrivals.have_come(run))

    def _heal(self, position: int) -> None:
        """Write what has come over older copies of the same blocks that have rotted."""
        by_disk: dict[int, list[Damage]] = {}
        for damage in self._store.damages()[:HEALS_MAX]:
            by_disk.setdefault(damage.disk, []).append(damage)
        disks = {shape.index for shape in self._store.chain().points[-1].disks}
        for disk in sorted(disks & by_disk.keys()):
            with self._store.open_view(position, disk) as view:
                for damage in by_disk[disk]:
                    with contextlib.suppress(IntegrityError):
                        data = read_blocks(view, damage.block, 1)
                        self._store.heal(disk, damage.block, data)

    def _check(self, position: int, manifest: Manifest, runs: Sequence[RepairRun]) -> list[Finding]:
        findings = find_unreadable(self._store, position, runs)
        if runs:
            self._heal(position)
        now = time.monotonic()
        if manifest.audit and _is_comparable(manifest) and now >= self._audit_at:
            findings += audit_chunks(self._store, position, manifest.audit, manifest.disks)
            took = time.monotonic() - now
            if took > LONG_AUDIT_SECONDS:
                self._audit_at = now + took / AUDIT_SHARE
        return findings

    def _take(self, findings: Sequence[Finding], *, closing: Sequence[RepairRun] = ()) -> None:
        asked = self._book.ask([finding.run for finding in findings], closing=closing)
        self._arrivals.keep(self._book.open_runs)
        self._arrivals.expect(asked)  # one that is reopened has come, and to no avail
        self._store.note_damages([found.damage for found in findings if found.damage is not None])
        for finding in findings:
            run = finding.run
            if any(
                fresh.disk == run.disk and fresh.block <= run.block < fresh.block + fresh.count
                for fresh in asked
            ):
                self.tell(finding.code, finding.message)

    def _count(self) -> None:
        metrics = self._metrics
        metrics.restorable_time_seconds.labels(self._target().name).set(self._restorable_ns / _NS)
        metrics.repair_runs.labels(self._target().name).set(len(self._book.open_runs))


def _is_comparable(manifest: Manifest) -> bool:
    """Whether the sample and the blocks are of one instant, and all blocks have been sent."""
    return manifest.bookmark.consistency.restorable and not manifest.initial

"""The manifests of one machine that lie in the cache, and which of them comes next.

Containers are listed no further than it takes to find the next changeset, so that a long backlog
costs no more than a short one.
"""

import uuid
from collections import deque
from collections.abc import Container
from dataclasses import dataclass, replace

from appliance.applier.apply import Opened
from appliance.applier.cache_account import CacheAccount
from appliance.applier.succession import (
    DAMAGED,
    UNREAD,
    Apply,
    Gap,
    Idle,
    Read,
    Unread,
    follow,
)
from replication.bookmark import NOTHING, Stamp
from replication.cache_layout import (
    CONTAINER_CHANGESETS,
    MANIFEST_PREFIX,
    container_last,
    machine_prefix,
    manifest_name,
    manifest_number,
    sums_container,
    sums_generation,
)
from replication.envelope import AttemptKey
from replication.errors import IntegrityError, PeerError
from replication.manifest import MANIFEST_BYTES_MAX, Manifest, open_manifest

CONTAINERS_LISTED_MAX = 256
"""In one look: 16,384 changesets, about a day of them at one in five seconds."""

TOLD_COUNT_MAX = 4096


@dataclass(frozen=True, slots=True)
class Seen:
    """A manifest that a listing shows; ``since`` once it was read."""

    container: str
    version: str
    since: int | Unread = UNREAD


@dataclass(frozen=True, slots=True)
class Fault:
    """A manifest that cannot be used: which blob, and why."""

    name: str
    message: str


class Inbox:
    """What waits for one machine.

    containers: all of the machine's, as of the last look.
    sums:       generations whose sums are in the cache.
    passed_over: containers that wait and are too many to be listed in one look.
    newest:     the newest changeset that names tell of, or its container's first: unproven.
    authentic:  the newest changeset whose manifest was opened.
    unopened:   the newest one whose manifest the data key did not open, while no other was opened
                since: altered, or sealed under another key.
    """

    def __init__(
        self, account: CacheAccount, machine: uuid.UUID, data_key: bytes, data_key_file: str
    ) -> None:
        self._account = account
        self._machine = machine
        self._data_key = data_key
        self._data_key_file = data_key_file
        self._seen: dict[Stamp, Seen] = {}
        self._before: dict[Stamp, Seen] = {}
        self._unlisted: deque[str] = deque()
        self._opened: Opened | None = None
        self._told: set[tuple[Stamp, str]] = set()
        self._faults: list[Fault] = []
        self.containers: list[str] = []
        self.sums: list[int] = []
        self.passed_over = 0
        self.newest = NOTHING
        self.authentic = NOTHING
        self.unopened: tuple[str, Stamp] | None = None

    async def look(self, head: Stamp) -> None:
        """Find out anew which containers there are; ``next`` lists what it needs of them."""
        names = await self._account.containers(machine_prefix(self._machine))
        lasts = {name: last for name in names if (last := container_last(name)) is not None}
        self.containers = sorted(lasts, key=lambda name: lasts[name])
        self.sums = [found for name in names if (found := sums_generation(name)) is not None]
        waiting = [name for name in self.containers if lasts[name] > head]
        # The newest generation first: its stream has taken the place of the older ones. But
        # whoever can make containers must not hide those that go on from here behind them.
        waiting.sort(key=lambda name: (-lasts[name].generation, lasts[name].number))
        ours = [name for name in waiting if lasts[name].generation == head.generation]
        ours = ours[: CONTAINERS_LISTED_MAX // 2]
        newer = [name for name in waiting if lasts[name].generation > head.generation]
        listed = [*newer[: CONTAINERS_LISTED_MAX - len(ours)], *ours]
        self.passed_over = len(waiting) - len(listed)
        self._before, self._seen = self._seen, {}
        self._unlisted = deque(listed)
        for last in lasts.values():
            first = max(1, last.number + 1 - CONTAINER_CHANGESETS)
            self.newest = max(self.newest, Stamp(last.generation, first))

    async def next(self, head: Stamp, aside: Container[Stamp] = ()) -> Opened | Gap | Idle:
        """The changeset to apply to ``head``, or why there is none.

        aside: changesets that cannot be applied now, as if their manifests were damaged.
        """
        while True:
            manifests = {
                stamp: DAMAGED if stamp in aside else seen.since
                for stamp, seen in self._seen.items()
            }
            step = follow(head, manifests)
            match step:
                case Read(stamp):
                    await self._read(stamp)
                case Apply(stamp):
                    if self._opened is not None and self._opened.manifest.stamp == stamp:
                        return self._opened
                    self._seen[stamp] = replace(self._seen[stamp], since=UNREAD)
                case _ if self._unlisted:
                    await self._list(self._unlisted.popleft())
                case Gap() | Idle():
                    return step

    def refuse(self, stamp: Stamp, message: str) -> None:
        """Pass ``stamp`` over until its manifest is put again: it is authentic, and unusable."""
        self._mark(stamp, message)

    def doubt(self) -> None:
        """Read again what could not be used: it may have been mended, or misread."""
        for stamp, seen in self._seen.items():
            if seen.since is DAMAGED:
                self._seen[stamp] = replace(seen, since=UNREAD)

    def forget(self, head: Stamp) -> None:
        """Drop what is not after ``head``."""
        self._seen = {stamp: seen for stamp, seen in self._seen.items() if stamp > head}
        self._opened = None

    def passed(self, head: Stamp, *, sums_are_needed: bool) -> list[str]:
        """Containers that nothing more can come into once ``head`` is applied."""
        passed = [
            name
            for name in self.containers
            if (last := container_last(name)) is not None and last < head
        ]
        passed += [
            sums_container(self._machine, generation)
            for generation in self.sums
            if generation < head.generation
            or (generation == head.generation and not sums_are_needed)
        ]
        return passed

    def take_faults(self) -> list[Fault]:
        """Each damaged manifest once for each time that it was put."""
        faults, self._faults = self._faults, []
        return faults

    async def _list(self, container: str) -> None:
        last = container_last(container)
        assert last is not None
        for blob in await self._account.blobs(container, MANIFEST_PREFIX):
            number = manifest_number(blob.name)
            if (
                number is None
                or number // CONTAINER_CHANGESETS != last.number // CONTAINER_CHANGESETS
            ):
                continue  # not one of ours, and it must not stand in the place of one
            stamp = Stamp(last.generation, number)
            before = self._before.get(stamp)
            known = before is not None and before.version == blob.version
            self._seen[stamp] = before if known and before else Seen(container, blob.version)
            self.newest = max(self.newest, stamp)

    async def _read(self, stamp: Stamp) -> None:
        seen = self._seen[stamp]
        name = manifest_name(stamp.number)
        raw = await self._account.read(seen.container, name, MANIFEST_BYTES_MAX)
        if raw is None:
            self._mark(stamp, "it is listed and cannot be read")
            return
        try:
            manifest, key = self._open(raw, stamp, self._data_key)
        except PeerError as error:
            self._mark(stamp, str(error))
            return
        except IntegrityError as error:
            self.unopened = seen.container, stamp
            hint = f"or {self._data_key_file} is not the data key of this machine's agent"
            self._mark(stamp, f"{error}, {hint}")
            return
        self._opened = Opened(manifest, key, seen.container)
        self.unopened = None
        self.authentic = max(self.authentic, stamp)
        self._seen[stamp] = replace(seen, since=manifest.since)

    async def is_opened_by(self, data_key: bytes) -> bool:
        """Whether another data key opens what ours did not."""
        if self.unopened is None:
            return False
        container, stamp = self.unopened
        name = manifest_name(stamp.number)
        raw = await self._account.read(container, name, MANIFEST_BYTES_MAX)
        try:
            return raw is not None and bool(self._open(raw, stamp, data_key))
        except (PeerError, IntegrityError):
            return False

    def _open(self, raw: bytes, stamp: Stamp, data_key: bytes) -> tuple[Manifest, AttemptKey]:
        manifest, key = open_manifest(raw, data_key)
        if (manifest.machine, manifest.stamp) != (self._machine, stamp):
            raise IntegrityError(
                f"it is the manifest of {manifest.stamp} of {manifest.machine}, in the place of"
                f" that of {stamp} of {self._machine}"
            )
        return manifest, key

    def _mark(self, stamp: Stamp, message: str) -> None:
        seen = self._seen[stamp]
        self._seen[stamp] = replace(seen, since=DAMAGED)
        if (stamp, seen.version) in self._told:
            return
        if len(self._told) >= TOLD_COUNT_MAX:
            self._told.clear()
        self._told.add((stamp, seen.version))
        name = f"{seen.container}/{manifest_name(stamp.number)}"
        self._faults.append(Fault(name, f"{name}: {message}"))

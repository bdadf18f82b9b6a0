"""Puts the sums of the store's state into the cache while a resync waits for them.

The head is then the changeset that began the resync, and stays so until its source has compared.
A cache may forget what it took, and others may write into it: as long as the head stays, the blobs
are looked at again and again, and put anew where they are missing or not as they were put. After a
restart all of them are made anew: nothing here has to be remembered.
"""

import contextlib
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import xxhash

from appliance.applier.cache_account import CacheAccount
from appliance.applier.keeping import Keeping
from appliance.applier.resync_record import Begun
from appliance.applier.settled import settled
from appliance.applier.state_sums import Group, Sums, groups_of, sums_of
from appliance.applier.store.machine_store import MachineStore
from replication.cache_layout import sums_container, sums_name
from replication.errors import StorageError, UnavailableError
from replication.manifest import NO_BASIS
from replication.sums import SUMS_BYTES_MAX, SumsPlace, seal_sums

READ_BACK_MAX = 16
"""Parts that are read back at each look: what was altered keeps its size in a listing."""

SUMS_PREFIX = "sums/"


@dataclass(frozen=True, slots=True)
class _Put:
    """A part as it was put."""

    group: Group
    size_bytes: int
    digest: bytes


@dataclass(slots=True)
class _Publication:
    """The sums of one state.

    waiting: groups to make and put.
    put:     parts by the names of their blobs.
    whole:   whether all of them were put at least once.
    """

    begun: Begun
    position: int
    waiting: deque[Group]
    put: dict[str, _Put] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    unread: deque[str] = field(default_factory=deque)
    whole: bool = False


class SumsPublisher:
    """One open store's publisher; for one coroutine."""

    def __init__(
        self,
        store: MachineStore,
        account: CacheAccount,
        machine: uuid.UUID,
        data_key: bytes,
        *,
        keeping: Keeping,
        look_seconds: float,
    ) -> None:
        self._store = store
        self._account = account
        self._machine = machine
        self._data_key = data_key
        self._keeping = keeping
        self._look_seconds = look_seconds
        self._look_at = 0.0
        self._publication: _Publication | None = None

    @property
    def basis(self) -> bytes:
        """The basis whose sums, of the head's state, are in the cache; NO_BASIS without any."""
        publication = self._current()
        return publication.begun.basis if publication and publication.whole else NO_BASIS

    @property
    def is_needed(self) -> bool:
        """Whether the head still is what began a resync, so that its source may ask for sums."""
        return self._current() is not None

    async def tend(self) -> bool:
        """Put some of what is to be put; True when there is more to do at once.

        Raises UnavailableError when the cache does not take it, IntegrityError or StorageError
        when the state cannot be read.
        """
        publication = self._current()
        if publication is None:
            return False
        if not publication.waiting:
            publication.whole = True
            await self._look(publication)
        if publication.waiting:
            # In turn, and away from the list only when it is there: a failure repeats it.
            await self._put(publication, publication.waiting[0])
            publication.waiting.popleft()
        return bool(publication.waiting) or not publication.whole

    def _current(self) -> _Publication | None:
        """What is to be published now: of another state than before, from the beginning."""
        head = self._store.head
        begun = self._keeping.resync.at(head.stamp, head.attempt) if head is not None else None
        if head is None or begun is None:
            self._publication = None
            return None
        publication = self._publication
        if publication is None or publication.begun.basis != begun.basis:
            point = next(p for p in self._store.chain().points if p.position == head.position)
            self._keeping.resync.note_runs(begun, self._keeping.damaged())
            publication = _Publication(begun, head.position, deque(groups_of(point.disks)))
            self._publication = publication
        return publication

    async def _put(self, publication: _Publication, group: Group) -> None:
        made = await settled(
            sums_of, self._store, publication.position, group, self._keeping.damaged()
        )
        container = sums_container(self._machine, publication.begun.stamp.generation)
        for sums in made:
            data = seal_sums(self._data_key, self._place(publication, group, sums), sums.data)
            name = sums_name(group.shape.index, sums.level, sums.part)
            with _told():
                await self._account.write(container, name, data)
            publication.put[name] = _Put(group, len(data), xxhash.xxh3_128_digest(data))
            publication.versions.pop(name, None)
            publication.unread.append(name)

    def _place(self, publication: _Publication, group: Group, sums: Sums) -> SumsPlace:
        begun, shape = publication.begun, group.shape
        return SumsPlace(
            self._machine,
            begun.stamp,
            begun.basis,
            shape.index,
            sums.level,
            sums.part,
            shape.size_bytes,
        )

    async def _look(self, publication: _Publication) -> None:
        """Find out what the cache has lost or changed, and have it put again."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + self._look_seconds
        container = sums_container(self._machine, publication.begun.stamp.generation)
        with _told():
            there = {blob.name: blob for blob in await self._account.blobs(container, SUMS_PREFIX)}
        again = set()
        for name, put in publication.put.items():
            blob = there.get(name)
            if blob is None or blob.size_bytes != put.size_bytes:
                again.add(put.group)
            elif publication.versions.setdefault(name, blob.version) != blob.version:
                publication.versions[name] = blob.version
                publication.unread.append(name)
        for _ in range(min(READ_BACK_MAX, len(publication.unread))):
            name = publication.unread.popleft()
            with _told():
                found = await self._account.read(container, name, SUMS_BYTES_MAX)
            put = publication.put[name]
            if found is None or xxhash.xxh3_128_digest(found) != put.digest:
                again.add(put.group)
        publication.waiting.extend(sorted(again, key=lambda one: (one.shape.index, one.number)))


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the cache refuses is no failure of the store: it is tried again."""
    try:
        yield
    except StorageError as error:
        raise UnavailableError(f"the cache refuses the sums: {error}") from error

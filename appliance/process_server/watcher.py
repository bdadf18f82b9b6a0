"""What becomes of uploads: how far they are applied, which are forgotten, which are wanted again.

A cache that is killed may forget what it acknowledged some seconds before, and what was put over.
So an upload counts only when the applier's watermark has passed it; until then the spool keeps
it, the cache is asked now and then whether it still has it, and what the applier misses is put
again.
"""

import asyncio
from collections.abc import Iterable

import structlog

from appliance.process_server.cache_account import CacheAccount
from appliance.process_server.changeset import Changeset
from appliance.process_server.config import CacheConfig
from appliance.process_server.measures import Measures
from appliance.process_server.order import read_watermark
from appliance.process_server.persistence import Persistence
from appliance.process_server.segment_file import Segment
from appliance.process_server.stream import Stream, held_in_order
from appliance.process_server.uploader import Uploader, note_uploaded
from daemon.service import Health
from replication.cache_layout import (
    blob_number,
    container_name,
    manifest_name,
    segment_name,
)
from replication.errors import PeerError

RECHECK_SECONDS_MAX = 120.0
WANTED_AGAIN_SECONDS = 10.0
"""How long a blob that was put again is given before it is put once more."""


class Watcher:
    """Follows machines' watermarks."""

    def __init__(
        self,
        cache: CacheAccount,
        uploader: Uploader,
        config: CacheConfig,
        persistence: Persistence,
        measures: Measures,
        *,
        health: Health,
    ) -> None:
        self._cache = cache
        self._uploader = uploader
        self._config = config
        self._persistence = persistence
        self._health = health
        self._measures = measures

    async def run(self, stream: Stream) -> None:
        """Watch over ``stream`` until cancelled."""
        etag: str | None = None
        served: dict[str, float] = {}
        while True:
            etag = await self._persistence.insist(lambda etag=etag: self._look(stream, etag))  # type: ignore[misc]
            await self._persistence.insist(lambda: self._recheck(stream))
            await self._persistence.insist(lambda: self._serve(stream, served))
            await self._pause(stream)

    async def _pause(self, stream: Stream) -> None:
        if stream.unapplied:
            await asyncio.sleep(self._config.watermark_seconds)
            return
        stream.committed.clear()
        try:
            async with asyncio.timeout(self._config.watermark_idle_seconds):
                await stream.committed.wait()
        except TimeoutError:
            return

    async def _look(self, stream: Stream, etag: str | None) -> str | None:
        """Read the watermark if it is new; the ETag of what was read."""
        found = await self._cache.watermark(stream.machine, etag)
        if found is None:
            return etag
        part = f"watermark {stream.machine}"
        try:
            watermark = read_watermark(found.content, stream.machine, stream.position)
        except PeerError as error:
            self._health.report(part, warning=f"{error}: the one before is kept")
            return found.etag
        lost = watermark.lost and f"{stream.machine} needs a resync: {watermark.lost}"
        self._health.report(part, warning=lost)
        await stream.advance(watermark)
        return found.etag

    async def _recheck(self, stream: Stream) -> None:
        """Look for what was uploaded a while ago and is not applied; put what is gone again."""
        now = asyncio.get_running_loop().time()
        due: dict[str, list[Changeset]] = {}
        for changeset in held_in_order(stream):
            if changeset.whole and changeset.recheck_at <= now:
                container = container_name(stream.machine, changeset.stamp)
                due.setdefault(container, []).append(changeset)
        for container, changesets in due.items():
            sizes = await self._cache.sizes(container)
            for changeset in changesets:
                await self._mend(stream, changeset, sizes)

    async def _mend(self, stream: Stream, changeset: Changeset, sizes: dict[str, int]) -> None:
        if not stream.holds(changeset):
            return
        note_uploaded(changeset, sizes)
        doubled = max(2 * changeset.recheck_seconds, self._config.recheck_seconds)
        changeset.recheck_seconds = min(doubled, RECHECK_SECONDS_MAX)
        if changeset.whole:
            changeset.recheck_at = asyncio.get_running_loop().time() + changeset.recheck_seconds
            return
        self._measures.uploads_repeated.inc(len(changeset.segments) - len(changeset.uploads.done))
        changeset.whole = True  # it stays this task's, not the uploader's
        await self._uploader.put_segments(stream, changeset)
        if manifest_name(changeset.stamp.number) not in sizes:
            self._measures.uploads_repeated.inc()
        await self._uploader.put_manifest(stream, changeset)

    async def _serve(self, stream: Stream, served: dict[str, float]) -> None:
        """Put what the applier asks for over what is there."""
        now = asyncio.get_running_loop().time()
        wanted = stream.watermark.wanted
        for name in [name for name in served if name not in wanted]:
            del served[name]
        absent = []
        due = [
            name
            for name in wanted
            if now - served.get(name, -WANTED_AGAIN_SECONDS) >= WANTED_AGAIN_SECONDS
        ]
        names = names_of(held_in_order(stream)) if due else {}
        for name in due:
            for changeset, segment in names.get(name, ()):
                await self._put_wanted(stream, changeset, segment)
            if name not in names:
                absent.append(name)
                await self._give_up(stream, name, asked_before=name in served)
            served[name] = asyncio.get_running_loop().time()
        told = f"the applier asks for {absent[0]} and {len(absent) - 1} more" if absent else ""
        if absent or not wanted:
            self._health.report(
                f"wanted {stream.machine}", warning=told and f"{told}; the spool has them not"
            )

    async def _give_up(self, stream: Stream, name: str, *, asked_before: bool) -> None:
        """A blob that neither cache nor spool has, asked for again: its changeset is lost."""
        number = blob_number(name)
        applied = stream.watermark.applied
        lost = number is not None and stream.position.awaits(number, applied)
        if lost and asked_before and not stream.leads_on(applied):
            structlog.get_logger().warning(
                "acknowledged changesets are lost; the agent sends them again",
                machine=str(stream.machine),
                lost=str(stream.position.committed),
                applied=str(applied),
            )
            await stream.fall_back()

    async def _put_wanted(
        self, stream: Stream, changeset: Changeset, segment: Segment | None
    ) -> None:
        if not (changeset.whole and stream.holds(changeset)):
            return  # on its way for the first time, or applied meanwhile
        if segment is None:
            await self._uploader.put_manifest(stream, changeset, over=True)
        else:
            await self._uploader.put_segment(stream, changeset, segment, over=True)
        self._measures.uploads_repeated.inc()


def names_of(changesets: Iterable[Changeset]) -> dict[str, list[tuple[Changeset, Segment | None]]]:
    """What blobs of a stream's names are: segments, and None for the manifest.

    Made once for all that is wanted: there may be many of both.
    """
    found: dict[str, list[tuple[Changeset, Segment | None]]] = {}
    for changeset in changesets:
        number, attempt = changeset.stamp.number, changeset.id.attempt
        found.setdefault(manifest_name(number), []).append((changeset, None))
        for segment in changeset.segments:
            name = segment_name(number, attempt, segment.index)
            found.setdefault(name, []).append((changeset, segment))
    return found

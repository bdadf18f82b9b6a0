"""What the cache knows of a machine whose ledger is not here: the spool is new, or was lost.

The newest changeset that everything before leads up to: from the applier's watermark on, each
whole changeset (manifest and all segments there) that may follow on the one before. What lies
beyond a gap is not counted, so that the agent sends from the gap on. The watermark alone, which
nobody here can authenticate, makes no changeset acknowledged: where none follows on it, the agent,
which can, goes on from it.
"""

from collections.abc import Mapping
from dataclasses import replace

import xxhash

from appliance.process_server.cache_account import CacheAccount
from appliance.process_server.order import Position, read_watermark
from appliance.process_server.spool import Ledger
from replication.bookmark import GENERATION_LEAP_MAX, MachineId, Stamp
from replication.cache_layout import (
    CONTAINER_CHANGESETS,
    container_last,
    machine_prefix,
    manifest_name,
    manifest_number,
    segment_name,
)
from replication.errors import PeerError, UnavailableError
from replication.manifest import Manifest, read_public
from replication.watermark import Watermark


async def read_history(cache: CacheAccount, machine: MachineId) -> tuple[Ledger, Watermark]:
    """Also the watermark as it is; UnavailableError or StorageError while the cache is away."""
    watermark = await _read_watermark(cache, machine)
    ledger = Ledger(Position())
    for container in await cache.containers(machine_prefix(machine)):
        last = container_last(container)
        if last is None or last <= watermark.applied:
            continue
        sizes = await cache.sizes(container)
        first = last.number - CONTAINER_CHANGESETS + 1
        numbers = sorted(n for name in sizes if (n := manifest_number(name)) is not None)
        for number in numbers:
            stamp = Stamp(last.generation, number)
            reached = max(ledger.position.committed, watermark.applied)
            if first <= number <= last.number and stamp > reached:
                content = await cache.manifest(container, manifest_name(number))
                found = _read_whole(machine, stamp, content, sizes)
                if found is not None and _follows(reached, found):
                    digest = xxhash.xxh3_128_digest(content or b"")
                    position = ledger.position.after_commit(found, digest)
                    ledger = Ledger(position, found.bookmark.time_ns)
    position = ledger.position.after_applied(watermark.applied)
    return replace(ledger, position=position), watermark


async def _read_watermark(cache: CacheAccount, machine: MachineId) -> Watermark:
    found = await cache.watermark(machine)
    if found is None:
        return Watermark(machine)
    try:
        return read_watermark(found.content, machine, Position())
    except PeerError as error:
        raise UnavailableError(
            f"the watermark of {machine} cannot be read: {error}",
            hint="its applier writes a new one",
        ) from error


def _read_whole(
    machine: MachineId, stamp: Stamp, content: bytes | None, sizes: Mapping[str, int]
) -> Manifest | None:
    """The manifest of ``stamp``; None unless it and all its segments are there."""
    try:
        manifest = read_public(content or b"")
    except PeerError:
        return None  # damaged: as good as not there, and sent again
    mine = (manifest.machine, manifest.stamp) == (machine, stamp)
    return manifest if mine and _is_whole(manifest, sizes) else None


def _follows(reached: Stamp, manifest: Manifest) -> bool:
    generation = manifest.stamp.generation
    if generation > reached.generation + GENERATION_LEAP_MAX:
        return False
    return manifest.since <= (reached.number if reached.generation == generation else 0)


def _is_whole(manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    number = manifest.stamp.number
    return all(
        sizes.get(segment_name(number, manifest.attempt, index)) == entry.size_bytes
        for index, entry in enumerate(manifest.segments)
    )

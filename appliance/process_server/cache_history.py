"""What the cache knows of a machine whose ledger is not here: the spool is new, or was lost.

The newest changeset that everything before leads up to: from the applier's watermark on, each
whole changeset (manifest and all segments there) that may follow on the one before. What lies
beyond a gap is not counted, so that the agent sends from the gap on.
"""

from collections.abc import Mapping

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


async def read_history(cache: CacheAccount, machine: MachineId) -> Ledger:
    """Raise UnavailableError or StorageError when the cache does not answer."""
    watermark = await _read_watermark(cache, machine)
    position = Position(applied=watermark.applied).after_applied(
        watermark.applied, watermark.attempt
    )
    ledger = Ledger(position, watermark.restorable_ns)
    for container in await cache.containers(machine_prefix(machine)):
        last = container_last(container)
        if last is None or last <= position.applied:
            continue
        sizes = await cache.sizes(container)
        first = last.number - CONTAINER_CHANGESETS + 1
        numbers = sorted(n for name in sizes if (n := manifest_number(name)) is not None)
        for number in numbers:
            stamp = Stamp(last.generation, number)
            if first <= number <= last.number and stamp > ledger.position.committed:
                content = await cache.manifest(container, manifest_name(number))
                ledger = _follow(ledger, machine, stamp, content, sizes)
    return ledger


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


def _follow(
    ledger: Ledger,
    machine: MachineId,
    stamp: Stamp,
    content: bytes | None,
    sizes: Mapping[str, int],
) -> Ledger:
    """``ledger`` with the changeset ``stamp`` if it is whole and may come next."""
    try:
        manifest = read_public(content or b"")
    except PeerError:
        return ledger  # damaged: as good as not there, and sent again
    if (manifest.machine, manifest.stamp) != (machine, stamp) or not _is_whole(manifest, sizes):
        return ledger
    committed = ledger.position.committed
    if stamp.generation > committed.generation + GENERATION_LEAP_MAX:
        return ledger
    reached = committed.number if committed.generation == stamp.generation else 0
    if manifest.since > reached:
        return ledger
    digest = xxhash.xxh3_128_digest(content or b"")
    return Ledger(ledger.position.after_commit(manifest, digest), manifest.bookmark.time_ns)


def _is_whole(manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    number = manifest.stamp.number
    return all(
        sizes.get(segment_name(number, manifest.attempt, index)) == entry.size_bytes
        for index, entry in enumerate(manifest.segments)
    )

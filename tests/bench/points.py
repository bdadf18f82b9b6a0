"""Many recovery points: listing them, making one more, deleting the oldest, the space they take."""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from appliance.applier.measure import used_bytes
from appliance.applier.point_lists import read_list
from tests.bench import plain
from tests.bench.figure import AtMost, Row, spread
from tests.bench.place import GIB, MIB, Place
from tests.bench.reading import BLOCK_BYTES, Writing, writing

DISK_BYTES = 8 * GIB
CHANGED_BYTES = MIB
"""By each point, in random blocks of 4 KiB."""


def measure(where: Place) -> list[Row]:
    """1,000 points of one disk of 8 GiB, a fresh store each time that the bench runs."""
    count, repeats = (100, 3) if where.quick else (1000, 15)
    where.need_bytes(2 * count * CHANGED_BYTES)
    rng = random.Random(1)
    with writing(where, DISK_BYTES) as made:
        for _ in range(count):
            _change(made, rng)
        made.store.verify()
        folder = Path(made.store.folder)
        root, machine = str(folder.parents[1]), made.store.machine
        changed_bytes = sum(point.changed_bytes for point in made.store.points())
        share = used_bytes(str(folder)) / changed_bytes
        where.rest()
        listing, telling, making, deleting = [], [], [], []
        for _ in range(repeats):
            listing.append(_seconds(made.store.reader.points))
            telling.append(_seconds(lambda: read_list(root, machine)))
            making.append(_seconds(lambda: _change(made, rng)))
            oldest = made.store.points()[0].position
            deleting.append(_seconds(partial(made.store.fold_to, oldest + 1)))
            where.rest()
        writes = [
            CHANGED_BYTES / plain.write_and_sync(where.folder, CHANGED_BYTES)
            for _ in range(repeats)
        ]
    name = f"of {count:,} points of a disk of 8 GiB"
    limit, limit_is = statistics.median(writes), "one writer, the same bytes with fsync"
    return [
        Row(
            figure=f"list all {name}",
            unit="s",
            target=AtMost(0.1),
            measured=statistics.median(listing),
            note=f"{spread(listing)}; as told to the config server: {spread(telling)}",
        ),
        Row(
            figure=f"make one more {name}",
            unit="s",
            target=AtMost(1.0),
            measured=statistics.median(making),
            limit=limit,
            limit_is=limit_is,
            note=spread(making),
        ),
        Row(
            figure=f"delete the oldest {name}",
            unit="s",
            target=AtMost(1.0),
            measured=statistics.median(deleting),
            limit=limit,
            limit_is=limit_is,
            note=spread(deleting),
        ),
        Row(
            figure=f"space {name}, to the bytes changed",
            unit="",
            target=AtMost(1.15),
            measured=share,
            limit=1.0,
            limit_is="the bytes of the blocks alone",
            note=f"{changed_bytes / MIB:,.0f} MiB changed, {CHANGED_BYTES >> 10} KiB each",
        ),
    ]


def _change(made: Writing, rng: random.Random) -> None:
    chosen = sorted(rng.sample(range(DISK_BYTES // BLOCK_BYTES), CHANGED_BYTES // BLOCK_BYTES))
    made.seal([(block, 1) for block in chosen])


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began

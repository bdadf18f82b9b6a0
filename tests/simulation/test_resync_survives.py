"""Resyncs at random moments, against faults from a seed: no block is lost, no point overclaims.

The decisions are the real ones: bookkeeping, reconcile, order, succession, the applier's record of
resyncs, and the watermark with its authentication. What is simulated below them is unkind: writes
are on their way for a while and may end unseen, a reboot loses the trackers, a store is put back to
an older copy or another takes the machine over, and so are the process server's disk and the whole
machine, blobs and sums are forgotten, or all but the store is, watermarks forged.

Invariants:

- whatever a store holds after a consistent changeset equals the source at its bookmark, but for
  blocks that are known to be damaged;
- in the end, everything at rest, it equals the source, and nothing is damaged.
"""

import random
import tempfile
from collections.abc import Iterator

import pytest

from tests.simulation import restored
from tests.simulation.histories import histories
from tests.simulation.resync_world import World

COMMON = (
    "write",
    "land",
    "go_well",
    "turn",
    "die",
    "upload",
    "apply",
    "publish_sums",
    "prune",
    "settle",
)
WEIGHTS = (6, 4, 8, 6, 2, 6, 6, 4, 3, 2)


def _play(folder: str, seed: int, faults: tuple[str, ...], steps: int = 250) -> World:
    world = World(folder, random.Random(seed))
    world.refused = set()
    rng = world.rng
    for _ in range(steps):
        weights = (*WEIGHTS, *([1.0] * len(faults)))
        action = rng.choices((*COMMON, *faults), weights)[0]
        match action:
            case "die":
                world.turn(rng.randint(1, 4))
            case "settle":
                world.settle_cache()
            case "land":
                world.land()
            case _:
                act = getattr(World, action, None) or getattr(restored, action)
                act(world)
    world.come_to_rest()
    return world


@pytest.fixture
def folder() -> Iterator[str]:
    """In memory: what is tried here is the order of writes, not the disk's patience."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield path


FAULTS = {
    "interrupted": ("reboot", "order", "restart_agent"),
    "upstream": ("reboot", "order", "lose_spool", "crash_cache", "restart_agent"),
    "forged": ("reboot", "order", "forge", "crash_cache", "lose_spool"),
    "rotten": ("reboot", "rot", "crash_cache"),
    "stores": ("reboot", "order", "back_up", "put_back", "take_over", "crash_cache"),
    "forgotten": ("forget_all",),
    "copies": ("copy_server", "put_back_server", "reboot", "crash_cache"),
    "snapshots": ("copy_machine", "put_back_machine", "crash_cache", "lose_spool"),
    "everything": (
        "reboot", "order", "lose_spool", "crash_cache", "restart_agent", "forge", "rot",
        "back_up", "put_back", "take_over", "forget_all",
        "copy_server", "put_back_server",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("seed", histories(15, 40))
def test_every_history_ends_equal(kind: str, seed: int, folder: str) -> None:
    world = _play(folder, seed, FAULTS[kind])
    assert world.is_at_rest(), (world.agent.position, world.store.head, world.said)
    assert world.checked > 0

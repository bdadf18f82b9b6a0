"""What a world goes on from that is older than it is: copies put back, or nothing at all."""

import os
import shutil

from agents.mobility.stream_state import StreamStateFile
from appliance.applier.resync_record import ResyncRecord
from appliance.process_server.order import Position
from replication.block_set import BlockSet
from replication.manifest import NO_BASIS
from replication.watermark import Watermark
from tests.simulation.resync_store import Store
from tests.simulation.resync_world import World
from tests.simulation.test_stream_survives import BLOCK_COUNT, MACHINE


def forget_all(world: World) -> None:
    """Agent, appliance and cache begin anew; the second site stays, and is heard when it is."""
    shutil.rmtree(f"{world.folder}/agent")
    world.agent = StreamStateFile(f"{world.folder}/agent", MACHINE)
    world.carried = BlockSet(BLOCK_COUNT)
    world.server, world.sums = Position(), None
    world.spool.clear()
    world.cache.clear()
    world.unsynced.clear()
    world.refused.clear()
    world.watermark = world.old_watermark = Watermark(MACHINE)
    world.vain = 0
    world.connect()
    for _ in range(world.rng.choice((0, 5, 20, 40))):  # the applier is away for so long
        world.write()
        world.turn()
        world.upload()


def copy_server(world: World) -> None:
    """Somebody keeps a copy of the process server's disk."""
    world.server_copy = (world.server, dict(world.spool))


def put_back_server(world: World) -> None:
    """The process server's disk is put back as it was."""
    if world.server_copy is not None:
        world.server, spool = world.server_copy
        world.spool = dict(spool)


def copy_machine(world: World) -> None:
    """A snapshot of the source with its memory."""
    shutil.rmtree(f"{world.folder}/machine", ignore_errors=True)
    shutil.copytree(f"{world.folder}/agent", f"{world.folder}/machine")
    world.machine_copy = (
        list(world.source),
        dict(world.flying),
        world.marks.copy(),
        world.carried.copy(),
        world.fresh_pins,
    )


def put_back_machine(world: World) -> None:
    """The source goes on from its snapshot, as if nothing had happened since."""
    if world.machine_copy is None:
        return
    source, flying, marks, carried, world.fresh_pins = world.machine_copy
    world.source, world.flying = list(source), dict(flying)
    world.marks, world.carried = marks.copy(), carried.copy()
    shutil.rmtree(f"{world.folder}/agent")
    shutil.copytree(f"{world.folder}/machine", f"{world.folder}/agent")
    world.agent = StreamStateFile(f"{world.folder}/agent", MACHINE)


def back_up(world: World) -> None:
    world.backup = world.store.copy_to(f"{world.folder}/backup")


def put_back(world: World) -> None:
    """The store is put back; the record of resyncs with it, or the newer one stays."""
    if world.backup is None:
        return
    keep_record = world.rng.random() < 0.5
    newer = f"{world.store.folder}/resync.json"
    had = os.path.exists(newer)
    if keep_record and had:
        shutil.copy(newer, f"{world.folder}/record")
    world.store = world.backup.copy_to(world.store.folder)
    if keep_record and had:
        shutil.copy(f"{world.folder}/record", newer)
        world.store.record = ResyncRecord(world.store.folder)
    world.refused.clear()
    world.vain, world.published = 0, NO_BASIS
    world.publish()


def take_over(world: World) -> None:
    """Another applier, with a store of its own, owns the machine from now on."""
    other = world.other or Store(f"{world.folder}/b")
    world.store, world.other = other, world.store
    world.refused.clear()
    world.vain, world.published = 0, NO_BASIS
    world.publish()

"""In a process of its own: what is frozen stays so."""

import subprocess
import sys

PROGRAM = """
import asyncio, contextlib, gc, weakref
from daemon.garbage import YOUNG_COUNT, collect_fully, spare_the_old

class Knot:
    def __init__(self):
        self.me = self

old = Knot()
spare_the_old()
assert gc.get_freeze_count() > 1000

young = weakref.ref(Knot())
kept = [[] for _ in range(2 * YOUNG_COUNT)]
assert young() is None, "cycles of the young go as ever"

aged = Knot()
gc.collect(1)
seen = weakref.ref(aged)
del aged
kept = [[] for _ in range(50 * YOUNG_COUNT)]
assert seen() is not None, "no full collection comes by itself"

async def until_gone():
    task = asyncio.create_task(collect_fully(0.01))
    while seen() is not None:
        await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task

asyncio.run(asyncio.wait_for(until_gone(), 20))
assert old.me is old
"""


def test_full_collections_come_at_their_interval_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr

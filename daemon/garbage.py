"""Keeps the cyclic garbage collector from stopping a daemon that holds many objects.

A full collection looks at every object there is, and nothing else runs meanwhile: half a second for
the connections and reports of a thousand nodes, each few seconds by the defaults. So the young are
collected as ever, what the daemon began with is never looked at, and a full collection comes at an
interval of its own. What is in no cycle is freed at once in any case. Source: docs.python.org, gc.
"""

import asyncio
import gc

YOUNG_COUNT = 10_000
"""Objects made and not freed since the last collection of the youngest."""

MIDDLE_COUNT = 20
_NEVER = 1 << 30
FULL_SECONDS = 900.0


def spare_the_old() -> None:
    """Call once all parts are open: what there is by now stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_COUNT, MIDDLE_COUNT, _NEVER)


async def collect_fully(seconds: float = FULL_SECONDS) -> None:
    """A full collection every ``seconds``, until cancelled."""
    while True:
        await asyncio.sleep(seconds)
        gc.collect()

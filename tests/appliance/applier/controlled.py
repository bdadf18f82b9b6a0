"""An applier that a config server tells what to do: what it is told, and what it says."""

import asyncio
import contextlib
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from replication.control.assignment import AppliedMachine, ApplierAssignment
from replication.control.recovery import Hold
from tests.appliance.applier.running import WAIT_SECONDS_MAX, ApplierProcess, Site
from tests.appliance.applier.source import Source
from tests.appliance.applier.test_process import running
from tests.appliance.orders import Orders

NODE = uuid.uuid4()


@contextlib.contextmanager
def mounted(process: ApplierProcess, site: Site) -> Iterator[ApplierProcess]:
    try:
        with running(process):
            yield process
    finally:
        points = str(site.folder / "points")
        subprocess.run(["fusermount3", "-uz", points], check=False, capture_output=True)


def named(source: Source, name: str, **changed: Any) -> AppliedMachine:
    return AppliedMachine(id=source.machine, name=name, **changed)


def told(
    version: int,
    *machines: AppliedMachine,
    removed: tuple[uuid.UUID, ...] = (),
    holds: tuple[Hold, ...] = (),
) -> ApplierAssignment:
    return ApplierAssignment(version=version, machines=machines, removed=removed, holds=holds)


async def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS_MAX
    while not holds():
        assert time.monotonic() < deadline, "it does not come true"
        await asyncio.sleep(0.05)


def store_of(orders: Orders, source: Source) -> dict[str, Any]:
    """What the newest report says of a machine; empty when nothing."""
    stores = orders.reports.get(NODE, {}).get("stores", [])
    return next((one for one in stores if one["machine"] == str(source.machine)), {})


def known(orders: Orders, *sources: Source) -> None:
    for source in sources:
        orders.data_keys[source.machine] = source.data_key


def held_of(orders: Orders, hold: Hold) -> dict[str, Any]:
    """What the newest report says of a hold; empty when nothing."""
    holds = orders.reports.get(NODE, {}).get("holds", [])
    return next((one for one in holds if one["id"] == str(hold.id)), {})

"""How soon a vCenter's inventory is known, and how soon a change in it: from API to API."""

import asyncio
import time
from typing import Any

from tests.appliance.config_server.discovery.scene import Scene, discovering
from tests.bench.figure import AtMost, Row, spread
from tests.bench.place import Place
from tests.vsphere_emu.fixtures import Client, VCenterProcess, small_guest

CHANGES = 10


def measure(where: Place) -> list[Row]:
    """Reading of 1,000 VMs after connecting, and power changes among them."""
    count = 100 if where.quick else 1000
    vcenter = VCenterProcess(where.folder, "bench", [small_guest("a")], synthetic_count=count)
    try:
        vcenter.start()
        return asyncio.run(_measure(where, vcenter, count))
    finally:
        vcenter.remove()


async def _measure(where: Place, vcenter: VCenterProcess, count: int) -> list[Row]:
    async with discovering(where.folder) as scene:
        await scene.add(vcenter)
        await scene.until("connected", lambda one: one["instance_uuid"] != "",
                          lambda: scene.vcenter("bench"))  # fmt: skip
        began = time.monotonic()
        told = await scene.until_state("bench", "connected")
        read_seconds = time.monotonic() - began
        assert told["vm_count"] == count + 1
        client = await asyncio.to_thread(vcenter.client)
        vm = await asyncio.to_thread(client.vm, "a")
        seen = [
            await _change(scene, client, vm, on=index % 2 == 0)
            for index in range(4 if where.quick else CHANGES)
        ]
    return [
        Row(
            figure=f"discovery: {count:,} VMs read and written after connecting",
            unit="s",
            target=AtMost(8),
            measured=read_seconds,
        ),
        Row(
            figure=f"discovery: power change among {count:,} VMs shown by the API",
            unit="s",
            target=AtMost(2),
            measured=max(seen),
            note=spread(seen),
        ),
    ]


async def _change(scene: Scene, client: Client, vm: Any, *, on: bool) -> float:
    """Seconds from the end of the power task until the API shows it."""
    task = vm.PowerOnVM_Task() if on else vm.PowerOffVM_Task()
    await asyncio.to_thread(client.finish, task)
    began = time.monotonic()
    wanted = "on" if on else "off"
    await scene.until("a is seen", bool, lambda: scene.vms(name="a", power=wanted))
    return time.monotonic() - began

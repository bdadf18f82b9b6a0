"""A config server of real parts that discovers, and an operator who looks at what it found."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx

from tests.appliance.config_server.running import Rig, open_rig
from tests.vsphere_emu.fixtures import PASSWORD, USER, VCenterProcess

SECONDS_MAX = 45.0
TICK_SECONDS = 0.05


class Scene:
    """What the tests of discovery ask and wait for."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self._running = asyncio.create_task(rig.server.discovery.run())
        self.operator = rig.operator()

    async def stop(self) -> None:
        """End discovery as a config server that ends does."""
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        await self.rig.server.discovery.close()

    async def add(self, vcenter: VCenterProcess, **changes: Any) -> httpx.Response:
        body = {
            "name": vcenter.name,
            "url": vcenter.url,
            "username": USER,
            "password": PASSWORD,
            "ca_pem": vcenter.ca_pem,
        }
        return await self.operator.post("vcenters", json={**body, **changes})

    async def vcenter(self, name: str) -> dict[str, Any]:
        answer = await self.operator.get(f"vcenters/{name}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    async def vms(self, **query: Any) -> dict[str, dict[str, Any]]:
        """All VMs by name, read page by page."""
        found: dict[str, dict[str, Any]] = {}
        cursor: str | None = None
        while True:
            params = {**query, **({"cursor": cursor} if cursor else {})}
            answer = await self.operator.get("vms", params=params)
            assert answer.status_code == 200, answer.text
            page = answer.json()
            found |= {vm["name"]: vm for vm in page["items"]}
            cursor = page["next"]
            if cursor is None:
                return found

    async def until(self, what: str, holds: Callable[[Any], bool], ask: Any) -> Any:
        """Ask until it holds; return what was told then."""
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            told = await ask()
            if holds(told):
                return told
            assert time.monotonic() < deadline, f"{what}: {told}"
            await asyncio.sleep(TICK_SECONDS)

    async def until_state(self, name: str, state: str) -> dict[str, Any]:
        told = await self.until(
            f"{name} is {state}", lambda one: one["state"] == state, lambda: self.vcenter(name)
        )
        return dict(told)

    async def until_vm(self, name: str, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        told = await self.until(
            f"VM {name}", lambda vms: name in vms and holds(vms[name]), self.vms
        )
        return dict(told[name])


@contextlib.asynccontextmanager
async def discovering(folder: Path, **config: Any) -> AsyncIterator[Scene]:
    """A config server whose discovery runs."""
    async with open_rig(folder, **config) as rig:
        scene = Scene(rig)
        try:
            async with scene.operator:
                yield scene
        finally:
            await scene.stop()

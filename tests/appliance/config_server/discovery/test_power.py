"""Switching VMs at real vCenters (govmomi's simulator)."""

import asyncio
import uuid
from pathlib import Path

import pytest
from sqlalchemy import select, update

from appliance.config_server.discovery.power import VCenterPower, VmPowerState
from appliance.config_server.store.schema import VCenter, VirtualMachine
from replication.errors import ConflictError, NotFoundError, UnavailableError
from tests.appliance.config_server.discovery.scene import discovering
from tests.vsphere_emu.fixtures import PASSWORD, MakeVCenter, small_guest


async def test_power_is_switched_and_asked_for(make_vcenter: MakeVCenter, tmp_path: Path) -> None:
    east = await asyncio.to_thread(make_vcenter, "east", [small_guest("web-01")])
    async with discovering(tmp_path) as scene:
        await scene.add(east)
        await scene.until_state("east", "connected")
        server = scene.rig.server
        switch = VCenterPower(server.database, server.identity.vault)
        vm = uuid.UUID((await scene.vms())["web-01"]["id"])
        assert await switch.power_state(vm) is VmPowerState.OFF
        await switch.power_off(vm)  # it is
        await switch.power_on(vm)
        await asyncio.gather(switch.power_off(vm), switch.power_off(vm))
        assert await switch.power_state(vm) is VmPowerState.OFF
        await switch.power_on(vm)
        await switch.power_on(vm)
        assert await switch.power_state(vm) is VmPowerState.ON

        with pytest.raises(NotFoundError, match="there is no virtual machine"):
            await switch.power_off(uuid.uuid4())
        async with server.database.writing() as session:
            await session.execute(update(VirtualMachine).values(moid="vm-17"))
        with pytest.raises(NotFoundError, match="does not have it any more"):
            await switch.power_off(vm)
        async with server.database.writing() as session:
            row = (await session.scalars(select(VCenter))).one()
            row.password = server.identity.vault.seal(b"no", "vcenters", row.id)
        with pytest.raises(ConflictError, match="user or password is wrong"):
            await switch.power_off(vm)
        async with server.database.writing() as session:
            await session.execute(update(VCenter).values(instance_uuid=str(uuid.uuid4())))
            row = (await session.scalars(select(VCenter))).one()
            row.password = server.identity.vault.seal(PASSWORD.encode(), "vcenters", row.id)
        with pytest.raises(ConflictError, match="another vCenter"):
            await switch.power_off(vm)
        await asyncio.to_thread(east.kill)
        with pytest.raises(UnavailableError, match="cannot be reached: Connection refused"):
            await switch.power_off(vm)

"""Discovery against real vCenters (govmomi's simulator), through the API."""

import asyncio
import contextlib
import datetime as dt
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyVmomi import vim as pyvmomi_vim
from sqlalchemy import select

from appliance.config_server.discovery.inventory import swapped
from appliance.config_server.discovery.service import open_discovery
from appliance.config_server.store.schema import AuditEntry, VCenter, VirtualMachine
from daemon.certificates import Issuer, certificate_pem
from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.discovery.scene import discovering
from tests.appliance.config_server.running import open_rig
from tests.vsphere_emu.fixtures import MIB, PASSWORD, Client, MakeVCenter, small_guest

vim: Any = pyvmomi_vim  # its classes are made when they are first asked for
BIOS = uuid.UUID("421f6a50-1234-5678-9abc-def012345678")
WEB = small_guest(
    "web-01",
    bios_uuid=str(BIOS),
    hostname="web-01.lab",
    folder="Production/Web",
    adapters=[{"network": "production", "addresses": ["192.0.2.7", "fd00::7"]}],
)


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.to_thread(work, *arguments)


async def test_inventory_is_read_and_every_kind_of_change_followed(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east = make_vcenter("east", [WEB, small_guest("b")], esx_hosts=["esx-01", "esx-02"])
    async with discovering(tmp_path) as scene:
        added = await scene.add(east)
        assert added.status_code == 201, added.text
        told = await scene.until_state("east", "connected")
        assert told["vm_count"] == 2
        vms = await scene.vms()
        assert vms.keys() == {"web-01", "b"}
        web = vms["web-01"]
        assert web["bios_uuid"] == str(BIOS)
        assert (web["folder"], web["host"]) == ("/DC0/Production/Web", "esx-01")
        assert (web["power"], web["addresses"], web["machine"]) == ("off", [], None)
        (disk,) = web["disks"]
        assert disk["path"] == "[datastore1] web-01/root.vmdk"
        assert disk["capacity_bytes"] == 4 * MIB

        client = await in_thread(east.client)
        vm = await in_thread(client.vm, "web-01")
        await in_thread(client.finish, vm.PowerOnVM_Task())
        web = await scene.until_vm("web-01", lambda one: one["power"] == "on")
        web = await scene.until_vm("web-01", lambda one: bool(one["addresses"]))
        assert web["addresses"] == ["192.0.2.7", "fd00::7"]
        assert (web["hostname"], web["tools"]) == ("web-01.lab", "guestToolsRunning")

        await in_thread(client.finish, vm.Rename_Task("web/renamed"))
        web = await scene.until_vm("web/renamed", lambda _: True)
        assert web["moid"] == vm._moId
        assert "web-01" not in await scene.vms()

        folder = await in_thread(client.find, vim.Folder, "Web")
        await in_thread(client.finish, folder.Rename_Task("Sites"))
        await scene.until_vm("web/renamed", lambda one: one["folder"] == "/DC0/Production/Sites")
        above = await in_thread(client.find, vim.Folder, "Production")
        await in_thread(client.finish, above.MoveIntoFolder_Task([vm]))
        await scene.until_vm("web/renamed", lambda one: one["folder"] == "/DC0/Production")
        host = await in_thread(client.find, vim.HostSystem, "esx-02")
        relocate = vm.RelocateVM_Task(vim.vm.RelocateSpec(host=host))
        await in_thread(client.finish, relocate)
        await scene.until_vm("web/renamed", lambda one: one["host"] == "esx-02")

        await in_thread(_add_disk, client, vm)
        web = await scene.until_vm("web/renamed", lambda one: len(one["disks"]) == 2)
        assert {one["capacity_bytes"] for one in web["disks"]} == {4 * MIB, 16 * MIB}

        other = await in_thread(client.vm, "b")
        await in_thread(client.finish, other.Destroy_Task())
        await scene.until("b is gone", lambda vms: "b" not in vms, scene.vms)
        config = vim.vm.ConfigSpec(
            name="new", guestId="otherGuest", files=vim.vm.FileInfo(vmPathName="[datastore1]")
        )
        pool = await in_thread(client.find, vim.ResourcePool, "Resources")
        make = above.CreateVM_Task(config, pool, host)
        await in_thread(client.finish, make)
        await scene.until_vm("new", lambda one: one["power"] == "off")
        told = await scene.vcenter("east")
        assert (told["vm_count"], told["state"]) == (2, "connected")


def _add_disk(client: Client, vm: Any) -> None:
    devices = client.properties(vm, "config.hardware.device")["config.hardware.device"]
    controller = next(
        one for one in devices if isinstance(one, vim.vm.device.VirtualSCSIController)
    )
    backing = vim.vm.device.VirtualDisk.FlatVer2BackingInfo(
        fileName="[datastore1] web-01/more.vmdk", diskMode="persistent"
    )
    disk = vim.vm.device.VirtualDisk(
        key=-1, controllerKey=controller.key, unitNumber=5, capacityInKB=16 * 1024, backing=backing
    )
    change = vim.vm.device.VirtualDeviceSpec(operation="add", fileOperation="create", device=disk)
    client.finish(vm.ReconfigVM_Task(vim.vm.ConfigSpec(deviceChange=[change])))


async def test_session_that_is_ended_is_followed_by_another_login(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east = make_vcenter("east", [WEB])
    async with discovering(tmp_path) as scene:
        await scene.add(east)
        await scene.until_state("east", "connected")
        client = await in_thread(east.client)
        assert await in_thread(client.terminate_others) >= 1
        vm = await in_thread(client.vm, "web-01")
        await in_thread(client.finish, vm.PowerOnVM_Task())
        await scene.until_vm("web-01", lambda one: one["power"] == "on")
        assert (await scene.vcenter("east"))["state"] == "connected"


async def test_vcenter_that_dies_keeps_its_vms_as_stale_and_comes_back_without_one(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east = make_vcenter("east", [WEB, small_guest("b")])
    async with discovering(tmp_path) as scene:
        await scene.add(east)
        await scene.until_state("east", "connected")
        before = await scene.vms()
        await in_thread(east.kill)
        told = await scene.until_state("east", "unreachable")
        assert told["reason"]
        vms = await scene.vms()
        assert {name: vm["stale"] for name, vm in vms.items()} == {"web-01": True, "b": True}
        guests, east.guests = east.guests, east.guests[:1]
        east.write()
        await in_thread(east.start)
        await scene.until_state("east", "connected")
        vms = await scene.vms()
        assert {name: (vm["stale"], vm["id"]) for name, vm in vms.items()} == {
            "web-01": (False, before["web-01"]["id"])
        }
        assert await in_thread(east.stop) == 0
        east.guests = guests
        east.write()
        await in_thread(east.start)
        back = await scene.until_vm("b", lambda one: not one["stale"])
        assert back["id"] == before["b"]["id"]


async def test_two_vcenters_with_equal_moids_are_kept_apart(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east, west = (make_vcenter(name, [small_guest("a")]) for name in ("east", "west"))
    async with discovering(tmp_path) as scene:
        for vcenter in (east, west):
            await scene.add(vcenter)
        for name in ("east", "west"):
            await scene.until_state(name, "connected")
        items = (await scene.operator.get("vms")).json()["items"]
        assert [vm["name"] for vm in items] == ["a", "a"]
        assert items[0]["moid"] == items[1]["moid"]
        assert {vm["vcenter"] for vm in items} == {"east", "west"}
        client = await in_thread(west.client)
        vm = await in_thread(client.vm, "a")
        await in_thread(client.finish, vm.PowerOnVM_Task())
        await scene.until("west's is on", lambda vms: vms["a"]["power"] == "on",
                          lambda: scene.vms(vcenter="west"))  # fmt: skip
        assert (await scene.vms(vcenter="east"))["a"]["power"] == "off"
        assert (await scene.vms(power="on"))["a"]["vcenter"] == "west"
        assert (await scene.operator.delete("vcenters/west")).status_code == 204
        assert {vm["vcenter"] for vm in (await scene.vms()).values()} == {"east"}
        assert (await scene.operator.get("vcenters/west")).status_code == 404


async def test_same_vcenter_twice_is_refused(make_vcenter: MakeVCenter, tmp_path: Path) -> None:
    east = make_vcenter("east", [small_guest("a")])
    async with discovering(tmp_path) as scene:
        await scene.add(east)
        await scene.until_state("east", "connected")
        assert (await scene.add(east)).status_code == 409
        await scene.add(east, name="again")
        told = await scene.until_state("again", "unreachable")
        assert "the same vCenter as east" in told["reason"]
        assert told["vm_count"] == 0


async def test_wrong_password_is_tried_once_until_it_is_changed(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east = make_vcenter("east", [WEB])
    async with discovering(tmp_path) as scene:
        await scene.add(east, password="wrong")
        told = await scene.until_state("east", "refused")
        assert told["reason"] == "user or password is wrong"
        await in_thread(east.kill)  # whoever tried again would find it unreachable
        await asyncio.sleep(3)  # longer than a look at the table
        assert (await scene.vcenter("east"))["state"] == "refused"
    async with discovering(tmp_path) as scene:  # the config server starts again
        await asyncio.sleep(1)
        assert (await scene.vcenter("east"))["state"] == "refused"
        assert not [one for one in threading.enumerate() if one.name == "vcenter east"]
        await in_thread(east.start)
        changed = await scene.operator.patch("vcenters/east", json={"password": PASSWORD})
        assert changed.status_code == 200
        await scene.until_state("east", "connected")


async def test_certificate_is_checked_by_ca_by_pin_or_not_at_all(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east, west = (make_vcenter(name, [small_guest("a")]) for name in ("east", "west"))
    async with discovering(tmp_path) as scene:
        await scene.add(east, name="system-ca", ca_pem="")
        told = await scene.until_state("system-ca", "unreachable")
        assert "its certificate is not trusted" in told["reason"]
        await scene.operator.delete("vcenters/system-ca")
        for verify, pem in (("ca", west.ca_pem), ("pinned", west.certificate_pem)):
            await scene.add(east, name="wrong", verify=verify, ca_pem=pem)
            told = await scene.until_state("wrong", "unreachable")
            assert "its certificate is not trusted" in told["reason"]
            await scene.operator.delete("vcenters/wrong")
        await scene.add(east, verify="pinned", ca_pem=east.certificate_pem)
        await scene.until_state("east", "connected")
        await scene.add(west, verify="none", ca_pem="")
        await scene.until_state("west", "connected")


async def test_password_goes_nowhere_else_unless_it_is_said_again(tmp_path: Path) -> None:
    issuers = (Issuer.create(name, dt.timedelta(days=1)) for name in ("ours", "another"))
    pem, other = (certificate_pem(issuer.certificate).decode() for issuer in issuers)
    body = {"name": "east", "url": "https://127.0.0.1:1", "username": "u", "password": PASSWORD}
    async with open_rig(tmp_path) as rig, rig.operator() as operator:
        made = await operator.post("vcenters", json={**body, "ca_pem": pem})
        assert made.status_code == 201, made.text
        loose = {"verify": "none", "password": PASSWORD}

        async def patch(**changes: str) -> int:
            return (await operator.patch("vcenters/east", json=changes)).status_code

        for changes in (
            {"url": "https://127.0.0.1:2"},
            {"verify": "none"},
            {"ca_pem": other},
            {"ca_pem": ""},
            {"verify": "pinned", "ca_pem": other},
        ):
            before = (await operator.get("vcenters/east")).json()
            refused = await operator.patch("vcenters/east", json=changes)
            assert refused.status_code == 422, changes
            assert "password" in refused.json()["message"]
            assert (await operator.get("vcenters/east")).json() == before
            assert await patch(**changes, password=PASSWORD) == 200
            assert await patch(**body, verify="ca", ca_pem=pem) == 200
        assert await patch(username="v", url=body["url"], verify="ca", ca_pem=pem) == 200
        assert await patch(verify="pinned") == 200  # a stricter check by the same certificate
        assert await patch(verify="ca") == 422
        assert await patch(**loose) == 200
        assert await patch(verify="ca") == 200


async def test_password_is_in_no_answer_no_audit_entry_and_not_in_the_clear(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east = make_vcenter("east", [small_guest("a")])
    async with discovering(tmp_path) as scene:
        told = [(await scene.add(east)).text]
        told.append((await scene.operator.patch("vcenters/east", json={"password": PASSWORD})).text)
        told.append((await scene.operator.get("vcenters")).text)
        told.append((await scene.add(east, url="nonsense")).text)
        async with scene.rig.server.database.reading() as session:
            row = await session.scalar(select(VCenter))
            assert row is not None
            assert PASSWORD.encode() not in row.password
            told += [str(one.detail) for one in await session.scalars(select(AuditEntry))]
        assert len(told) > 5
        assert not [text for text in told if "kinds" in text]


async def test_vm_is_matched_to_its_machine_in_either_byte_order(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    twin = str(uuid.uuid4())
    guests = [WEB, small_guest("b", bios_uuid=twin), small_guest("b-copy", bios_uuid=twin)]
    east = make_vcenter("east", guests)
    async with discovering(tmp_path) as scene:
        await scene.rig.enrol(NodeRole.MACHINE, name="web", bios_uuid=swapped(BIOS))
        await scene.rig.enrol(NodeRole.MACHINE, name="twin", bios_uuid=uuid.UUID(twin))
        await scene.add(east)
        await scene.until_state("east", "connected")
        vms = await scene.vms()
        assert {name: vm["machine"] for name, vm in vms.items()} == {
            "web-01": "web", "b": None, "b-copy": None,
        }  # fmt: skip
        assert (await scene.vms(unprotected="true")).keys() == vms.keys()
        assert (await scene.vms(name="B-C")).keys() == {"b-copy"}


async def test_one_of_two_config_servers_reads(make_vcenter: MakeVCenter, tmp_path: Path) -> None:
    east = make_vcenter("east", [WEB])
    async with discovering(tmp_path) as scene:
        await scene.add(east)
        await scene.until_state("east", "connected")
        server = scene.rig.server
        async with open_discovery(
            server.database, server.identity.vault, server.health, server.clock, instance="other"
        ) as other:
            running = asyncio.create_task(other.run())
            try:
                await asyncio.sleep(0.5)
                assert other._readers == {}
                await scene.stop()
                await scene.until("the other one reads", bool, lambda: _holder(scene, "other"))
                client = await in_thread(east.client)
                vm = await in_thread(client.vm, "web-01")
                await in_thread(client.finish, vm.PowerOnVM_Task())
                await scene.until_vm("web-01", lambda one: one["power"] == "on")
            finally:
                running.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await running


async def _holder(scene: Any, name: str) -> bool:
    async with scene.rig.server.database.reading() as session:
        row = await session.scalar(select(VCenter))
        return bool(row.reader == name and row.state == "connected")


async def test_thousand_vms_are_read_and_a_change_among_them_is_seen(
    make_vcenter: MakeVCenter, tmp_path: Path
) -> None:
    east = make_vcenter("east", [WEB], synthetic_count=1000)
    async with discovering(tmp_path) as scene:
        await scene.add(east)
        told = await scene.until_state("east", "connected")
        assert told["vm_count"] == 1001
        assert len(await scene.vms()) == 1001
        client = await in_thread(east.client)
        vm = await in_thread(client.vm, "web-01")
        await in_thread(client.finish, vm.PowerOnVM_Task())
        await scene.until_vm("web-01", lambda one: one["power"] == "on")
        assert (await scene.operator.delete("vcenters/east")).status_code == 204
        async with scene.rig.server.database.reading() as session:
            assert (await session.scalars(select(VirtualMachine))).all() == []


async def test_reader_may_look_and_not_touch(tmp_path: Path) -> None:
    async with discovering(tmp_path) as scene:
        async with scene.rig.operator(OperatorRole.OPERATOR) as operator:
            assert (await operator.get("vcenters")).json() == {"items": [], "next": None}
            assert (await operator.get("vms")).json() == {"items": [], "next": None}
            assert (await operator.get("vms", params={"vcenter": "x"})).status_code == 404
            body = {"name": "x", "url": "https://x", "username": "u", "password": "p"}
            assert (await operator.post("vcenters", json=body)).status_code == 403
            assert (await operator.delete("vcenters/x")).status_code == 403
        for url in ("http://x", "https://", "https://u:p@x", "https://x?y", "https://x:99999"):
            answer = await scene.operator.post("vcenters", json={**body, "url": url})
            assert answer.status_code == 422, url
        answer = await scene.operator.post("vcenters", json={**body, "ca_pem": "nonsense"})
        assert answer.status_code == 422
        answer = await scene.operator.post("vcenters", json={**body, "verify": "pinned"})
        assert answer.status_code == 422

import time
import urllib.error
import urllib.request
from pathlib import Path
from ssl import create_default_context

import pytest
from pyVmomi import vim

from tests.vsphere_emu.fixtures import MIB, MakeVCenter, VCenterProcess, small_guest
from vsphere_emu import block_device
from vsphere_emu.guest import GuestStatus

WEB = {
    "name": "web-01",
    "disks": [{"name": "root", "size_bytes": 32 * MIB, "file_system": "ext4"}],
    "workload": {"kind": "web", "disk": "root", "writes_per_second": 5},
    "bios_uuid": "421f6a50-1234-5678-9abc-def012345678",
    "hostname": "web-01.lab",
    "folder": "Production/Web",
    "adapters": [{"network": "production", "addresses": ["192.0.2.7", "fd00::7"]}],
}
FOLLOW_SECONDS_MAX = 15.0


def await_power(vcenter: VCenterProcess, name: str, *, on: bool) -> GuestStatus:
    deadline = time.monotonic() + FOLLOW_SECONDS_MAX
    while time.monotonic() < deadline:
        guest = vcenter.status(name)
        is_on = guest.is_powered_on and guest.workload_pid is not None
        is_off = not any(disk.device for disk in guest.disks) and guest.workload_pid is None
        if is_on if on else is_off:
            return guest
        time.sleep(0.1)
    raise AssertionError(f"{name} did not follow: {vcenter.log.read_text()}")


def test_vm_shows_what_the_fixture_says(make_vcenter: MakeVCenter) -> None:
    vcenter = make_vcenter("east", [WEB, small_guest("raw-01")])
    client = vcenter.client()
    vm = client.vm("web-01")
    told = client.properties(
        vm,
        "config.uuid", "config.hardware.device", "runtime.powerState", "parent", "guest.hostName",
    )  # fmt: skip
    assert told["config.uuid"] == WEB["bios_uuid"]
    assert told["runtime.powerState"] == "poweredOff"
    assert not told.get("guest.hostName")
    assert told["parent"].name == "Web"
    (disk,) = [one for one in told["config.hardware.device"] if hasattr(one, "capacityInKB")]
    assert disk.backing.fileName == "[datastore1] web-01/root.vmdk"
    assert disk.capacityInBytes == 32 * MIB
    assert client.find(vim.Network, "production").name == "production"
    assert (vcenter.folder / "store/web-01/root-flat.vmdk").stat().st_size == 32 * MIB


def test_power_of_a_vm_starts_and_stops_its_guest(make_vcenter: MakeVCenter) -> None:
    vcenter = make_vcenter("east", [WEB])
    client = vcenter.client()
    vm = client.vm("web-01")
    client.finish(vm.PowerOnVM_Task())
    guest = await_power(vcenter, "web-01", on=True)
    (disk,) = guest.disks
    assert disk.mount is not None
    told = client.properties(vm, "guest.ipAddress", "guest.hostName", "guest.toolsRunningStatus")
    assert told == {
        "guest.ipAddress": "192.0.2.7",
        "guest.hostName": "web-01.lab",
        "guest.toolsRunningStatus": "guestToolsRunning",
    }
    client.finish(vm.PowerOffVM_Task())
    await_power(vcenter, "web-01", on=False)
    assert block_device.loops_of(str(vcenter.folder / "store/web-01/root-flat.vmdk")) == ()
    assert not client.properties(vm, "guest.ipAddress").get("guest.ipAddress")


def test_power_off_cuts_and_shutdown_writes_out(make_vcenter: MakeVCenter) -> None:
    vcenter = make_vcenter("east", [WEB])
    client = vcenter.client()
    vm = client.vm("web-01")
    kept = []
    for number, switch_off in enumerate((vm.PowerOffVM_Task, vm.ShutdownGuest)):
        client.finish(vm.PowerOnVM_Task())
        (disk,) = await_power(vcenter, "web-01", on=True).disks
        folder = Path(str(disk.mount))
        kept.append([(folder / str(before)).exists() for before in range(number)])
        (folder / str(number)).write_text("in memory alone")
        switch_off()
        await_power(vcenter, "web-01", on=False)
    client.finish(vm.PowerOnVM_Task())
    (disk,) = await_power(vcenter, "web-01", on=True).disks
    kept.append([Path(f"{disk.mount}/{number}").exists() for number in range(2)])
    assert kept == [[], [False], [False, True]]


def test_state_of_guests_and_names_of_vms_survive_its_death(make_vcenter: MakeVCenter) -> None:
    vcenter = make_vcenter("east", [small_guest("a"), small_guest("b"), small_guest("c")])
    client = vcenter.client()
    moids = {name: client.vm(name)._moId for name in "abc"}
    identity = client.content.about.instanceUuid
    client.finish(client.vm("b").PowerOnVM_Task())
    vcenter.kill_vcsim()
    deadline = time.monotonic() + FOLLOW_SECONDS_MAX
    while True:
        try:
            client = vcenter.client()
            break
        except OSError:
            assert time.monotonic() < deadline, vcenter.log.read_text()
            time.sleep(0.1)
    assert client.content.about.instanceUuid == identity
    assert {name: client.vm(name)._moId for name in "abc"} == moids
    assert client.properties(client.vm("b"), "runtime.powerState") == {
        "runtime.powerState": "poweredOn"
    }
    assert vcenter.stop() == 0
    vcenter.guests = vcenter.guests[1:]
    vcenter.write()
    vcenter.start()
    client = vcenter.client()
    assert {name: client.vm(name)._moId for name in "bc"} == {"b": moids["b"], "c": moids["c"]}
    vcenter.guests = [small_guest("a"), *vcenter.guests]
    vcenter.write()


def test_two_vcenters_are_told_apart(make_vcenter: MakeVCenter) -> None:
    one, two = (make_vcenter(name, [small_guest("a")]).client() for name in ("east", "west"))
    assert one.content.about.instanceUuid != two.content.about.instanceUuid
    assert one.vm("a")._moId == two.vm("a")._moId


def test_datastore_is_served_to_nobody_who_is_not_logged_in(make_vcenter: MakeVCenter) -> None:
    vcenter = make_vcenter("east", [small_guest("a")])
    context = create_default_context(cadata=vcenter.ca_pem)
    for path in ("/folder/a/root-flat.vmdk?dsName=datastore1", "/folder/../folder/a/root.vmdk"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(vcenter.url + path, context=context, timeout=10)
        assert refused.value.code == 401
    with pytest.raises(vim.fault.InvalidLogin):
        vcenter.client().content.sessionManager.Login("administrator@vsphere.local", "no", None)


def test_port_in_use_is_told(make_vcenter: MakeVCenter, tmp_path: Path) -> None:
    vcenter = make_vcenter("east", [small_guest("a")])
    done = vcenter.command("serve")
    assert done.returncode == 2
    assert "is in use by another emulator" in done.stderr
    other = VCenterProcess(tmp_path, "west", [small_guest("a")])
    other.port = vcenter.port
    other.write()
    try:
        done = other.command("serve")
        assert done.returncode == 2
        assert "the port is in use" in done.stderr
    finally:
        other.remove()


def test_serve_without_a_vcenter_is_refused(tmp_path: Path) -> None:
    vcenter = VCenterProcess(tmp_path, "east", [small_guest("a")])
    lines = vcenter.config.read_text().splitlines()
    vcenter.config.write_text("\n".join(x for x in lines if not x.startswith("vcenter")))
    done = vcenter.command("serve")
    assert done.returncode == 2
    assert "has no [vcenter]" in done.stderr

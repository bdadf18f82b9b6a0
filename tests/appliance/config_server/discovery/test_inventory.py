import uuid
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.discovery.inventory import (
    ChangeKind,
    Identity,
    Match,
    Place,
    VirtualDisk,
    Vm,
    bios_uuid_from,
    compare,
    folder_path,
    match,
    place_from,
    swapped,
    vm_from,
)

BIOS = uuid.UUID("421f6a50-1234-5678-9abc-def012345678")
PLACES = {
    "datacenter-2": Place("Datacenter", "DC0", "group-d1"),
    "group-v3": Place("Folder", "vm", "datacenter-2"),
    "group-v9": Place("Folder", "Production", "group-v3"),
    "group-v10": Place("Folder", "vm", "group-v9"),
    "host-20": Place("HostSystem", "esx-01.example"),
}


def reference(moid: str) -> SimpleNamespace:
    return SimpleNamespace(_moId=moid)


def disk(key: int, path: str, kib: int, **more: object) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        capacityInKB=kib,
        backing=SimpleNamespace(fileName=path, uuid=f"u{key}"),
        deviceInfo=SimpleNamespace(label=f"Hard disk {key - 1999}"),
        **more,
    )


PROPERTIES = {
    "name": "web%2f01",
    "parent": reference("group-v9"),
    "runtime.host": reference("host-20"),
    "runtime.powerState": "poweredOn",
    "config.uuid": str(BIOS).upper(),
    "config.guestFullName": "Debian GNU/Linux 12 (64-bit)",
    "config.hardware.device": [
        SimpleNamespace(key=200),
        disk(2001, "[ds] web/log.vmdk", 1024),
        disk(2000, "[ds] web/root.vmdk", 2, capacityInBytes=2049),
    ],
    "guest.hostName": "web-01.example",
    "guest.ipAddress": "192.0.2.7",
    "guest.net": [
        SimpleNamespace(ipAddress=["fe80::1", "192.0.2.7"]),
        SimpleNamespace(ipAddress=None),
        SimpleNamespace(ipAddress=["198.51.100.1"]),
    ],
    "guest.toolsRunningStatus": "guestToolsRunning",
}


def test_vm_is_made_of_its_properties() -> None:
    assert vm_from("vm-7", PROPERTIES, PLACES) == Vm(
        moid="vm-7",
        name="web/01",
        folder="/DC0/Production",
        host="esx-01.example",
        bios_uuid=BIOS,
        power="on",
        guest_system="Debian GNU/Linux 12 (64-bit)",
        hostname="web-01.example",
        addresses=("192.0.2.7", "fe80::1", "198.51.100.1"),
        tools="guestToolsRunning",
        disks=(
            VirtualDisk(2000, "Hard disk 1", "[ds] web/root.vmdk", 2049, "u2000"),
            VirtualDisk(2001, "Hard disk 2", "[ds] web/log.vmdk", 1 << 20, "u2001"),
        ),
    )


@pytest.mark.parametrize("absent", [*PROPERTIES, None])
def test_properties_may_be_absent(absent: str | None) -> None:
    """An inaccessible VM has next to none."""
    kept = {name: value for name, value in PROPERTIES.items() if absent not in (name, None)}
    vm = vm_from("vm-7", kept, PLACES)
    assert vm.moid == "vm-7"
    assert vm.name in ("web/01", "vm-7")


def test_only_the_hidden_folders_are_left_out_of_a_path() -> None:
    assert folder_path("group-v3", PLACES) == "/DC0"
    assert folder_path("group-v9", PLACES) == "/DC0/Production"
    assert folder_path("group-v10", PLACES) == "/DC0/Production/vm"
    assert folder_path("unknown", PLACES) == ""


def test_folders_in_a_circle_end() -> None:
    circle = {"a": Place("Folder", "a", "b"), "b": Place("Folder", "b", "a")}
    assert folder_path("a", circle).startswith("/")


def test_place_is_made_of_its_properties() -> None:
    told = place_from("Folder", {"name": "50%25", "parent": reference("group-v3")})
    assert told == Place("Folder", "50%", "group-v3")
    assert place_from("HostSystem", {}) == Place("HostSystem", "")


@pytest.mark.parametrize(
    "text", [None, "", "nonsense", "0" * 32, "ffffffff-ffff-ffff-ffff-ffffffffffff"]
)
def test_uuid_that_identifies_nothing_is_none(text: str | None) -> None:
    assert bios_uuid_from(text) is None


def test_each_kind_of_change_is_told() -> None:
    old = vm_from("vm-1", PROPERTIES, PLACES)
    more = {**PROPERTIES, "config.hardware.device": [disk(2000, "[ds] web/root.vmdk", 4)]}
    cases = {
        ChangeKind.RENAMED: {**PROPERTIES, "name": "web-02"},
        ChangeKind.MOVED: {**PROPERTIES, "parent": reference("group-v3")},
        ChangeKind.POWERED: {**PROPERTIES, "runtime.powerState": "poweredOff"},
        ChangeKind.DISKS: more,
        ChangeKind.CHANGED: {**PROPERTIES, "guest.hostName": "other"},
    }
    for kind, properties in cases.items():
        new = vm_from("vm-1", properties, PLACES)
        (change,) = compare({"vm-1": old}, {"vm-1": new})
        assert change.kinds == {kind}
        assert (change.before, change.after) == (old, new)
    moved = {**PLACES, "group-v9": Place("Folder", "Renamed", "group-v3")}
    (change,) = compare({"vm-1": old}, {"vm-1": vm_from("vm-1", PROPERTIES, moved)})
    assert change.kinds == {ChangeKind.MOVED}
    assert [change.kinds for change in compare({}, {"vm-1": old})] == [{ChangeKind.ADDED}]
    assert [change.kinds for change in compare({"vm-1": old}, {})] == [{ChangeKind.REMOVED}]


VMS = st.builds(
    Vm,
    moid=st.just("vm"),
    name=st.sampled_from("ab"),
    folder=st.sampled_from(["", "/DC"]),
    power=st.sampled_from(["on", "off"]),
    hostname=st.sampled_from("xy"),
    disks=st.sampled_from([(), (VirtualDisk(2000, "1", "p", 1),)]),
)
VIEWS = st.dictionaries(st.sampled_from(["vm-1", "vm-2", "vm-3"]), VMS)


@given(VIEWS, VIEWS)
def test_changes_lead_from_one_view_to_the_other(
    before: dict[str, Vm], after: dict[str, Vm]
) -> None:
    view = dict(before)
    for change in compare(before, after):
        assert change.before == view.get(change.moid)
        assert change.before != change.after
        if change.after is None:
            del view[change.moid]
        else:
            view[change.moid] = change.after
    assert view == after
    assert compare(after, after) == ()


def identity(number: int, bios: uuid.UUID | None, *names: str) -> Identity:
    return Identity(uuid.UUID(int=number), bios, names)


def test_machine_is_its_vm_in_either_byte_order() -> None:
    vm = identity(1, BIOS, "web-01")
    assert swapped(swapped(BIOS)) == BIOS != swapped(BIOS)
    for told in (BIOS, swapped(BIOS)):
        assert match([identity(9, told)], [vm])[uuid.UUID(int=9)] == Match(vm.id)


def test_order_as_written_wins_over_the_swapped_one() -> None:
    right, wrong = identity(1, BIOS), identity(2, swapped(BIOS))
    assert match([identity(9, BIOS)], [wrong, right])[uuid.UUID(int=9)] == Match(right.id)


def test_copies_are_told_apart_by_name_or_not_at_all() -> None:
    copies = [identity(1, BIOS, "web-01", "web-01.example"), identity(2, BIOS, "web-01-copy")]
    machine = uuid.UUID(int=9)
    assert match([identity(9, BIOS, "WEB-01.other")], copies)[machine] == Match(copies[0].id)
    for names in ((), ("db-01",), ("web-01", "web-01-copy")):
        told = match([identity(9, BIOS, *names)], copies)[machine]
        assert told == Match(None, "2 VMs have its BIOS UUID")


def test_two_machines_that_claim_one_vm_are_told_apart_by_name_or_both_refused() -> None:
    vm = identity(1, BIOS, "web-01")
    told = match([identity(8, BIOS, "web-01"), identity(9, BIOS, "copy")], [vm])
    assert [told[uuid.UUID(int=n)].vm for n in (8, 9)] == [vm.id, None]
    told = match([identity(8, BIOS, "a"), identity(9, BIOS, "b")], [vm])
    assert {one.vm for one in told.values()} == {None}
    assert "another enrolled machine" in told[uuid.UUID(int=8)].reason


@pytest.mark.parametrize("bios", [None, uuid.UUID(int=0), uuid.UUID(int=(1 << 128) - 1)])
def test_no_identity_matches_nothing(bios: uuid.UUID | None) -> None:
    told = match([identity(9, bios)], [identity(1, bios)])
    assert told[uuid.UUID(int=9)].vm is None


SMALL = st.sampled_from([None, BIOS, swapped(BIOS), uuid.UUID(int=5 << 64)])
PEOPLE = st.lists(st.tuples(SMALL, st.sampled_from(["", "a", "b"])), max_size=5)


@given(PEOPLE, PEOPLE)
def test_no_vm_is_given_to_two_machines(
    machines: list[tuple[uuid.UUID | None, str]], vms: list[tuple[uuid.UUID | None, str]]
) -> None:
    left = [identity(100 + n, bios, name) for n, (bios, name) in enumerate(machines)]
    right = {one.id: one for one in (identity(n, bios, x) for n, (bios, x) in enumerate(vms))}
    told = match(left, right.values())
    assert told.keys() == {one.id for one in left}
    given_out = [one.vm for one in told.values() if one.vm is not None]
    assert len(set(given_out)) == len(given_out)
    for machine in left:
        found = told[machine.id].vm
        assert (found is None) == bool(told[machine.id].reason)
        if found is not None:
            assert machine.bios_uuid is not None
            assert right[found].bios_uuid in (machine.bios_uuid, swapped(machine.bios_uuid))

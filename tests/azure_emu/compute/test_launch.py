import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azure_emu.compute.disk import Disk
from azure_emu.compute.launch import Boot, command_line, guest_options, script_image
from replication.control.recovery import DISKS_MAX, VirtualMachineOrder

FOLDER = "/data/vms/x"


def boot(disk_count: int = 1, *, nonce: str = "abc", script: str = "", kvm: bool = False) -> Boot:
    order = VirtualMachineOrder(
        id=uuid.uuid4(), name="web", machine=uuid.uuid4(), disks=(), network="n", script=script
    )
    disks = tuple(
        Disk(index, f"{FOLDER}/disk{index}.qcow2", f"/points/{index}", 512)
        for index in range(disk_count)
    )
    return Boot(FOLDER, order, disks, None, "kvm" if kvm else "tcg", "/guest", nonce)


def values(command: list[str], option: str) -> list[str]:
    return [command[at + 1] for at, word in enumerate(command) if word == option]


@pytest.mark.parametrize("disk_count", [0, 1, 9, DISKS_MAX])
def test_every_disk_has_a_place_of_its_own(disk_count: int) -> None:
    command = command_line(boot(disk_count, script="true"))
    places = [
        part.split("addr=")[1].split(",")[0]
        for part in values(command, "-device")
        if "addr=" in part
    ]
    assert len(places) == len(set(places)) == disk_count + 2 + 2  # script, tools; screen, random
    disks = [part for part in values(command, "-device") if "serial=disk" in part]
    assert len(disks) == disk_count
    assert all("rerror=stop,werror=stop" in part for part in disks)


def test_the_nonce_is_the_recovery_guests_alone() -> None:
    recovery, own = command_line(boot()), command_line(boot(nonce=""))
    assert "understudy.nonce=abc" in values(recovery, "-append")[0]
    assert values(own, "-append") == values(own, "-kernel") == []
    assert "bootindex=0" in " ".join(own)
    assert "bootindex" not in " ".join(recovery)


def test_a_sandbox_is_always_on_and_kvm_only_when_chosen() -> None:
    for each in (boot(), boot(nonce=""), boot(kvm=True)):
        assert values(command_line(each), "-sandbox")[0].startswith("on,")
    assert values(command_line(boot()), "-accel")[0].startswith("tcg")
    assert values(command_line(boot(kvm=True)), "-accel") == ["kvm"]


def test_script_and_tools_are_read_only_disks_of_the_recovery_guest() -> None:
    assert "tools" not in " ".join(command_line(boot()))
    assert "script.img" not in " ".join(command_line(boot(nonce="", script="true")))
    blocks = values(command_line(boot(script="true")), "-blockdev")
    assert sum("read-only=on" in block for block in blocks) == 4


def test_the_guest_is_told_its_time() -> None:
    assert "understudy.seconds=300" in guest_options(boot())


@given(st.text(max_size=2000))
def test_a_script_is_whole_sectors_and_stays_what_it_is(script: str) -> None:
    image = script_image(script)
    assert len(image) % 512 == 0
    assert image.startswith(script.encode("utf-8", "replace"))
    assert set(image[len(script.encode("utf-8", "replace")) :]) <= {10}

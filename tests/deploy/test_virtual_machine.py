"""A virtual machine of the lab, as a real qemu without a disk to start from."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.lab.virtual_machine import Drive, VirtualMachine
from replication.errors import UnavailableError
from tests.azure_emu.fixtures import free_ports

UUID = "7a0f9c9e-6d0e-4f59-9a1b-6f2f60a3c1d4"


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[VirtualMachine]:
    disk = tmp_path / "os.img"
    disk.write_bytes(bytes(1 << 20))
    made = VirtualMachine(
        str(tmp_path), "vm-01", (Drive(str(disk), "os", throw_away=True),), free_ports(1)[0], UUID
    )
    try:
        yield made
    finally:
        made.stop()


def test_machine_is_found_again_and_switched_off(machine: VirtualMachine) -> None:
    assert machine.pid() is None
    machine.start()
    pid = machine.pid()
    assert pid is not None
    machine.start()
    assert machine.pid() == pid
    machine.stop()
    assert machine.pid() is None
    machine.stop()
    assert not os.path.exists(f"/proc/{pid}/fd/0")


def test_process_that_took_over_the_number_is_not_the_machine(
    machine: VirtualMachine, tmp_path: Path
) -> None:
    (tmp_path / "vm-01.pid").write_text(f"{os.getpid()}\n")
    assert machine.pid() is None
    (tmp_path / "vm-01.pid").write_text("no number\n")
    assert machine.pid() is None


def test_machine_that_is_off_says_what_its_console_had(
    machine: VirtualMachine, tmp_path: Path
) -> None:
    (tmp_path / "vm-01.console").write_text("Boot error\r\n")
    with pytest.raises(UnavailableError, match="vm-01 is off: Boot error"):
        machine.wait_ready(5)


def test_start_is_read_from_the_console(machine: VirtualMachine, tmp_path: Path) -> None:
    machine.start()
    (tmp_path / "vm-01.console").write_text(
        "understudy-service: ready generation=3 counter=77\r\n\r\nboot-01 login: "
    )
    start = machine.wait_ready(5)
    assert (start.generation, start.counter) == (3, 77)


def test_disks_are_named_and_written_only_where_they_should_be(machine: VirtualMachine) -> None:
    command = list(machine.command())
    drive = command[command.index("-drive") + 1]
    assert drive.endswith(",format=raw,if=none,id=os,snapshot=on")
    assert "virtio-blk-pci,drive=os,serial=os" in command
    assert UUID in command

"""What a machine says of itself."""

import os
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.mobility.host import parse_bios_uuid, parse_os_release, read_host

VCENTER = uuid.UUID("420c8f5e-2b1a-9d3c-7e4f-001122334455")
REVERSED = uuid.UUID("5e8f0c42-1a2b-3c9d-7e4f-001122334455")
SERIAL = "VMware-42 0c 8f 5e 2b 1a 9d 3c-7e 4f 00 11 22 33 44 55\n"


def test_vmwares_serial_counts_for_more_than_the_reversed_field() -> None:
    assert parse_bios_uuid(str(REVERSED), SERIAL) == VCENTER


@pytest.mark.parametrize("serial", ["", "None", "VMware-42", "0123456789"])
def test_other_serials_say_nothing(serial: str) -> None:
    assert parse_bios_uuid(f"{str(VCENTER).upper()}\n", serial) == VCENTER


@pytest.mark.parametrize("told", ["", "Not Settable", str(uuid.UUID(int=0)), "f" * 32])
def test_firmware_without_a_uuid_has_none(told: str) -> None:
    assert parse_bios_uuid(told, "") is None


def test_system_has_its_pretty_name() -> None:
    text = 'NAME="Debian GNU/Linux"\n# x\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nBAD="x\n'
    assert parse_os_release(text) == "Debian GNU/Linux 12 (bookworm)"
    assert parse_os_release("NAME=Arch\nPRETTY_NAME='unended\n") == "Arch"


@given(st.text(), st.text())
def test_nonsense_is_no_error(left: str, right: str) -> None:
    parse_bios_uuid(left, right)
    parse_os_release(left)


def test_this_host_tells() -> None:
    given_uuid = uuid.uuid4()
    facts = read_host(given_uuid)
    assert facts.bios_uuid == given_uuid
    assert facts.kernel == os.uname().release
    assert facts.system

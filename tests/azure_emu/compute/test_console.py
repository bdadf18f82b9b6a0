import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azure_emu.compute.console import (
    RESULT_BYTES_MAX,
    RESULT_PREFIX,
    asks_for_login,
    result_of,
)

NONCE = "6e6f6e6365"


def text(plain: str) -> str:
    return base64.b64encode(plain.encode()).decode()


def system(**changed: Any) -> dict[str, Any]:
    told = {"disk": 0, "device": "/dev/vda", "kind": "ext4", "clean": True, "used_bytes": 7}
    return told | {"detail": ""} | changed


def line(nonce: str = NONCE, **changed: Any) -> bytes:
    tree = {"nonce": nonce, "file_systems": [system()], "script_exit": None, "output": ""} | changed
    return RESULT_PREFIX + json.dumps(tree).encode() + b"\r\n"


def test_the_result_is_found_among_whatever_else_is_on_a_console() -> None:
    console = b"[    0.1] booting\r\n\xff\xfe\x00 noise\r\n" + line(output=text("fine\n")) + b"more"
    check = result_of(console, NONCE)
    assert check is not None
    assert check.passed
    assert check.output == "fine"
    assert check.file_systems[0].device == "/dev/vda"
    assert check.file_systems[0].used_bytes == 7


@pytest.mark.parametrize(
    "console",
    [
        b"",
        line("another"),
        line(""),
        line()[:-2],
        line()[:-20] + b"\r\n",
        line(file_systems=None),
        line(file_systems=[system(disk=-1)]),
        line(file_systems=[{"disk": 0}]),
        line(file_systems=[system(detail="not base64!")]),
        line(script_exit="0"),
        line(script_exit=True),
        line(script_exit=-9),
        line(output=7),
        RESULT_PREFIX + b"[]\n",
        RESULT_PREFIX + b"[" * 100_000 + b"\n",
        RESULT_PREFIX + b'{"nonce": "' + NONCE.encode() + b'"}\n',
        line(output=text("x" * RESULT_BYTES_MAX)),
    ],
)
def test_what_is_forged_cut_off_or_no_result_counts_for_nothing(console: bytes) -> None:
    assert result_of(console, NONCE) is None


def test_a_boot_without_a_nonce_has_no_result() -> None:
    assert result_of(line(""), "") is None


def test_a_forged_line_does_not_hide_the_real_one() -> None:
    forged = line("forged", file_systems=[system(clean=False)])
    check = result_of(forged + forged[:-30] + b"\n" + line(), NONCE)
    assert check is not None
    assert check.passed


@pytest.mark.parametrize(
    ("changed", "passed", "told"),
    [
        ({}, True, "1 file system is clean"),
        ({"script_exit": 0}, True, "the script has passed"),
        ({"script_exit": 3}, False, "exit code 3"),
        ({"script_exit": 143}, False, "did not end in time"),
        ({"file_systems": []}, False, "no disk holds a file system"),
        ({"file_systems": [], "script_exit": 0}, True, "the script has passed"),
        (
            {"file_systems": [system(clean=False, detail=text("bad inode"))], "script_exit": 0},
            False,
            "/dev/vda of disk 0 (ext4): bad inode",
        ),
    ],
)
def test_what_the_guest_found_decides(changed: dict[str, Any], passed: bool, told: str) -> None:
    check = result_of(line(**changed), NONCE)
    assert check is not None
    assert (check.passed, told in check.detail) == (passed, True), check.detail


def test_of_a_long_output_the_end_is_kept_and_no_nul() -> None:
    check = result_of(line(script_exit=0, output=text("a" * 5000 + "\0end")), NONCE)
    assert check is not None
    assert len(check.output) <= 2000
    assert check.output.endswith("\\0end")


@pytest.mark.parametrize(
    ("console", "asks"),
    [
        (b"\r\nDebian GNU/Linux 12 web ttyS0\r\n\r\nweb login: ", True),
        (b"web login:", True),
        (b"web login: [   23.456789] random: crng init done\r\n", True),
        (b"web login: [  OK  ] Started x.\r\n" + b"y" * 9000, True),
        (b"web login: root\r\nPassword: ", False),
        (b"Last login: Tue Nov", False),
        (b"catalogin: x", False),
        (b"systemd[1]: Started getty", False),
        (b"", False),
    ],
)
def test_a_getty_that_waits_is_known_by_its_prompt(console: bytes, asks: bool) -> None:
    assert asks_for_login(console) is asks


@given(st.binary(max_size=3000))
def test_nothing_on_a_console_breaks_it(console: bytes) -> None:
    assert result_of(console, NONCE) is None
    asks_for_login(console)


@given(st.integers(0, 400), st.binary(max_size=3))
def test_a_damaged_line_never_passes_for_another(at: int, damage: bytes) -> None:
    whole = line(script_exit=0)
    damaged = whole[:at] + damage + whole[at + len(damage) + 1 :]
    check = result_of(damaged, NONCE)
    assert check is None or isinstance(check.passed, bool)

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from azure_emu.compute.boot_sector import HEAD_BYTES, boots_by_itself

CODE = b"\xfa\xeb\xfe"
EFI = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
BIOS = uuid.UUID("21686148-6449-6e6f-744e-656564454649")
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")


def mbr(*entries: tuple[int, int], code: bytes = CODE, signature: bytes = b"\x55\xaa") -> bytes:
    """Entries are (status, type); all have sectors."""
    packed = b"".join(
        struct.pack("<B3xB3xII", status, kind, 2048, 4096) for status, kind in entries
    )
    return code.ljust(446, b"\0") + packed.ljust(64, b"\0") + signature


def gpt(*kinds: uuid.UUID, code: bytes = CODE, size: int = 128) -> bytes:
    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QIII", 2, len(kinds), size, 0)
    entries = b"".join(kind.bytes_le.ljust(size, b"\0") for kind in kinds)
    return (mbr((0, 0xEE), code=code) + header.ljust(512, b"\0") + entries).ljust(64 << 10, b"\0")


@pytest.mark.parametrize(
    ("head", "boots"),
    [
        (mbr((0x80, 0x83)), True),
        (mbr((0, 0x83), (0x80, 0x07)), True),
        (mbr((0, 0x83)), False),
        (mbr((0x80, 0)), False),
        (mbr(), False),
        (mbr((0x80, 0x83), code=b""), False),
        (mbr((0x80, 0x83), signature=b"\0\0"), False),
        (gpt(LINUX, BIOS), True),
        (gpt(EFI, LINUX), True),
        (gpt(LINUX), False),
        (gpt(EFI, code=b""), False),
        (gpt(BIOS, size=127), False),
        (gpt(BIOS).replace(b"EFI PART", b"EFI TRAP"), False),
        (mbr((0, 0xEE)), False),
        (b"", False),
        (b"\0" * HEAD_BYTES, False),
        (mbr((0x80, 0x83))[:511], False),
        (b"\xeb\x58\x90MSDOS5.0".ljust(510, b"\0") + b"\x55\xaa", False),
    ],
)
def test_a_disk_boots_that_has_code_and_a_partition_to_go_on_with(head: bytes, boots: bool) -> None:
    assert boots_by_itself(head) is boots


def test_no_file_system_is_taken_for_a_disk_that_boots() -> None:
    ext4 = bytearray(4096)
    ext4[1080:1082] = b"\x53\xef"
    assert not boots_by_itself(bytes(ext4))


@given(st.binary(max_size=4096), st.booleans())
def test_nothing_that_is_on_a_disk_breaks_it(content: bytes, table: bool) -> None:
    boots_by_itself(gpt(BIOS)[:600] + content if table else content)


def test_a_table_far_away_is_not_looked_for() -> None:
    far = bytearray(gpt(BIOS))
    struct.pack_into("<Q", far, 512 + 72, 1 << 60)
    assert not boots_by_itself(bytes(far))

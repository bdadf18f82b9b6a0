"""Whether a disk can boot by itself, by its first sectors.

A BIOS starts what is in the first sector; it must be there, and a partition to go on with: an
active one of an MBR, or a BIOS boot or EFI system partition of a GPT. A disk that only UEFI could
boot has no code in its first sector, and is not taken for one that boots.

Source: UEFI Specification §5.2 (MBR), §5.3 (GPT).
"""

import struct
import uuid

SECTOR_BYTES = 512
HEAD_BYTES = 1 << 20
"""So much of a disk is looked at: both tables, wherever sane tools put them."""

_CODE_BYTES = 440
_ENTRY = struct.Struct("<B3xB3xII")
_ENTRIES_AT, _ENTRY_COUNT = 446, 4
_SIGNATURE = b"\x55\xaa"
_ACTIVE = 0x80
_PROTECTIVE = 0xEE
_GPT_HEADER = struct.Struct("<8s64xQIII")
_GPT_SIGNATURE = b"EFI PART"
_GPT_ENTRIES_MAX = 1024
_GPT_BOOTS = {
    uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"),  # EFI system
    uuid.UUID("21686148-6449-6e6f-744e-656564454649"),  # BIOS boot
}

assert _ENTRY.size == 16
assert _GPT_HEADER.size == 92


def boots_by_itself(head: bytes) -> bool:
    """``head``: the first HEAD_BYTES of the disk, or all of it."""
    if len(head) < SECTOR_BYTES or head[510:512] != _SIGNATURE or not any(head[:_CODE_BYTES]):
        return False
    entries = [
        _ENTRY.unpack_from(head, _ENTRIES_AT + _ENTRY.size * index) for index in range(_ENTRY_COUNT)
    ]
    if any(kind == _PROTECTIVE for _, kind, _, _ in entries):
        return _gpt_boots(head)
    return any(status == _ACTIVE and kind and count for status, kind, _, count in entries)


def _gpt_boots(head: bytes) -> bool:
    if len(head) < SECTOR_BYTES + _GPT_HEADER.size:
        return False
    signature, at, count, size, _ = _GPT_HEADER.unpack_from(head, SECTOR_BYTES)
    if signature != _GPT_SIGNATURE or size < 128 or size > SECTOR_BYTES * 8:
        return False
    for index in range(min(count, _GPT_ENTRIES_MAX)):
        kind = head[at * SECTOR_BYTES + index * size :][:16]
        if len(kind) == 16 and uuid.UUID(bytes_le=kind) in _GPT_BOOTS:
            return True
    return False

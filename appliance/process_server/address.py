"""What a request's path addresses. Paths have one spelling: nothing is decoded or tidied up.

Source: FORMAT.md §9.
"""

import re
import uuid
from dataclasses import dataclass

from appliance.process_server.refusal import Kind, RefusedError
from replication.bookmark import Stamp
from replication.errors import PeerError
from replication.frame import DISK_COUNT_MAX
from replication.manifest import SEGMENT_COUNT_MAX
from replication.sums import LEVELS, PART_NUMBER_MAX

_GENERATION_MAX = (1 << 32) - 1
_NUMBER_MAX = (1 << 63) - 1

_MACHINE = r"/v1/machines/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_NUMBER = r"(0|[1-9][0-9]{0,19})"
_CHANGESET = rf"{_MACHINE}/generations/{_NUMBER}/changesets/{_NUMBER}"
_STATE_PATH = re.compile(rf"{_MACHINE}/state")
_COMMIT_PATH = re.compile(rf"{_CHANGESET}/commit")
_SUMS_PATH = re.compile(rf"{_MACHINE}/generations/{_NUMBER}/sums/{_NUMBER}/{_NUMBER}/{_NUMBER}")
_SEGMENT_PATH = re.compile(rf"{_CHANGESET}/segments/{_NUMBER}")


@dataclass(frozen=True, slots=True)
class StateAddress:
    """``GET``: what is held of a machine's stream."""

    machine: uuid.UUID


@dataclass(frozen=True, slots=True)
class CommitAddress:
    """``POST``: the manifest of a changeset."""

    machine: uuid.UUID
    stamp: Stamp


@dataclass(frozen=True, slots=True)
class SegmentAddress:
    """``PUT``: one segment of a changeset."""

    machine: uuid.UUID
    stamp: Stamp
    segment: int


@dataclass(frozen=True, slots=True)
class SumsAddress:
    """``GET``: one part of the sums of a machine's state at the second site."""

    machine: uuid.UUID
    generation: int
    disk: int
    level: int
    part: int


Address = StateAddress | CommitAddress | SegmentAddress | SumsAddress


def read_address(method: str, path: str) -> Address:
    """Read a request line's path as it came.

    Raises RefusedError (not_found) for what is no address, PeerError for numbers out of range.
    """
    if method == "GET" and (match := _STATE_PATH.fullmatch(path)):
        return StateAddress(uuid.UUID(match[1]))
    if method == "POST" and (match := _COMMIT_PATH.fullmatch(path)):
        return CommitAddress(uuid.UUID(match[1]), _read_stamp(match[2], match[3]))
    if method == "PUT" and (match := _SEGMENT_PATH.fullmatch(path)):
        segment = _read_number("segment", match[4], 0, SEGMENT_COUNT_MAX - 1)
        return SegmentAddress(uuid.UUID(match[1]), _read_stamp(match[2], match[3]), segment)
    if method == "GET" and (match := _SUMS_PATH.fullmatch(path)):
        return SumsAddress(
            uuid.UUID(match[1]),
            _read_number("generation", match[2], 1, _GENERATION_MAX),
            _read_number("disk", match[3], 0, DISK_COUNT_MAX - 1),
            _read_number("level", match[4], min(LEVELS), max(LEVELS)),
            _read_number("part", match[5], 0, PART_NUMBER_MAX),
        )
    raise RefusedError(
        Kind.NOT_FOUND,
        f"{method:.10} {path!r:.120} addresses nothing here",
        hint="paths are spelt as in FORMAT.md §9: lower case, no leading zeros, nothing escaped",
    )


def _read_stamp(generation: str, number: str) -> Stamp:
    return Stamp(
        _read_number("generation", generation, 1, _GENERATION_MAX),
        _read_number("changeset", number, 1, _NUMBER_MAX),
    )


def _read_number(what: str, text: str, least: int, most: int) -> int:
    number = int(text)
    if not least <= number <= most:
        raise PeerError(f"the path names {what} {number}; {least} to {most} was expected")
    return number

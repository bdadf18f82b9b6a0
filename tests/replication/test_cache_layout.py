import re
import uuid

from hypothesis import given
from hypothesis import strategies as st

from replication.bookmark import Stamp
from replication.cache_layout import (
    CONTAINER_CHANGESETS,
    CONTROL_CONTAINER,
    WAKE_QUEUE,
    container_last,
    container_name,
    generation_prefix,
    lease_name,
    machine_prefix,
    manifest_name,
    manifest_number,
    segment_name,
    sums_container,
    sums_generation,
    sums_name,
    watermark_name,
)
from tests.replication.samples import MACHINE, quick
from tests.replication.samples import stamps as any_stamps

# What the names keep in order: a number a second for 30,000 years, a generation an hour for 11,000.
stamps = st.builds(Stamp, st.integers(1, 99_999_999), st.integers(1, 10**12 - 1))
AZURE_CONTAINER = re.compile(r"(?=.{3,63}\Z)[a-z0-9]+(-[a-z0-9]+)*")


@quick
@given(st.uuids(), any_stamps)
def test_container_names_are_allowed(machine: uuid.UUID, stamp: Stamp) -> None:
    assert AZURE_CONTAINER.fullmatch(container_name(machine, stamp))
    assert AZURE_CONTAINER.fullmatch(CONTROL_CONTAINER)
    assert AZURE_CONTAINER.fullmatch(WAKE_QUEUE)


@quick
@given(stamps, stamps)
def test_containers_and_blobs_are_ordered_as_changesets(one: Stamp, other: Stamp) -> None:
    one, other = sorted((one, other))
    assert container_name(MACHINE, one) <= container_name(MACHINE, other)
    if one.number < other.number:
        assert manifest_name(one.number) < manifest_name(other.number)
        assert segment_name(one.number, b"\xff" * 16, 9) < segment_name(other.number, bytes(16), 0)


@quick
@given(st.uuids(), stamps)
def test_container_is_told_by_a_changeset_and_tells_its_last(
    machine: uuid.UUID, stamp: Stamp
) -> None:
    name = container_name(machine, stamp)
    last = container_last(name)
    assert last is not None
    assert container_name(machine, last) == name
    assert stamp <= last
    assert last.number - stamp.number < CONTAINER_CHANGESETS
    assert container_name(machine, Stamp(last.generation, last.number + 1)) != name
    assert name.startswith(generation_prefix(machine, stamp.generation))
    assert name.startswith(machine_prefix(machine))


@quick
@given(st.integers(1, 10**12 - 1))
def test_manifest_number_reads_back(number: int) -> None:
    assert manifest_number(manifest_name(number)) == number
    assert manifest_number(segment_name(number, bytes(16), 0)) is None


@quick
@given(st.text(max_size=60))
def test_foreign_names_are_nobodys(name: str) -> None:
    assert container_last(name) is None
    assert manifest_number(name) is None


def test_names_that_merely_look_alike_are_foreign() -> None:
    name = container_name(MACHINE, Stamp(1, 1))
    assert container_last(name) == Stamp(1, 63)
    for other in (name[1:], name.upper(), f"{name}0", f"x{name}", name.replace("g", "", 1)):
        assert container_last(other) is None
    for blob in ("manifest/1", "manifest/0000000000001", "manifest/", "manifest/" + "\u0661" * 12):
        assert manifest_number(blob) is None


@quick
@given(
    st.tuples(
        st.integers(1, 10**12 - 1), st.binary(min_size=16, max_size=16), st.integers(0, 8191)
    ),
    st.tuples(
        st.integers(1, 10**12 - 1), st.binary(min_size=16, max_size=16), st.integers(0, 8191)
    ),
)
def test_segments_have_names_of_their_own(
    one: tuple[int, bytes, int], other: tuple[int, bytes, int]
) -> None:
    assert (segment_name(*one) == segment_name(*other)) == (one == other)


def test_names_are_those_of_the_page() -> None:
    name = container_name(MACHINE, Stamp(3, 640))
    assert name == f"{MACHINE.hex}-g00000003-000000000010"
    assert segment_name(7, bytes(16), 2) == f"segment/000000000007/{'00' * 16}/000002"
    assert manifest_name(7) == "manifest/000000000007"
    assert watermark_name(MACHINE) == f"watermark/{MACHINE}"
    assert lease_name(MACHINE) == f"lease/{MACHINE}"


def test_sums_have_a_container_that_no_changeset_has() -> None:
    name = sums_container(MACHINE, 7)
    assert name.startswith(machine_prefix(MACHINE))
    assert sums_generation(name) == 7
    assert container_last(name) is None
    assert sums_generation(container_name(MACHINE, Stamp(7, 1))) is None
    for strange in (f"{MACHINE.hex}-s7", f"{name}0x", "x", f"{MACHINE.hex}-s0000000007"):
        assert sums_generation(strange) is None
    assert sums_name(3, 2, 41) == "sums/03/2/00000041"

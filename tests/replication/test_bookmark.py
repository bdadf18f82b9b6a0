import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.bookmark import NOTHING, Consistency, Stamp, read_machine
from replication.errors import PeerError
from tests.replication.samples import quick, stamps


@quick
@given(stamps, stamps)
def test_stamps_are_ordered_by_generation_then_number(one: Stamp, other: Stamp) -> None:
    pairs = ((one.generation, one.number), (other.generation, other.number))
    assert (one < other) == (pairs[0] < pairs[1])
    assert one > NOTHING


@quick
@given(st.uuids())
def test_machine_reads_back(machine: uuid.UUID) -> None:
    assert read_machine(str(machine), "here") == machine


@quick
@given(st.one_of(st.text(), st.uuids().map(lambda m: m.hex), st.uuids().map(lambda m: m.urn)))
def test_other_spellings_of_a_machine_are_refused(text: str) -> None:
    with pytest.raises(PeerError, match="here"):
        read_machine(text, "here")
    upper = "7D444840-9dc0-11d1-b245-5ffdce74fad2"
    with pytest.raises(PeerError, match="here"):
        read_machine(upper, "here")


def test_points_are_made_of_consistent_bookmarks_alone() -> None:
    assert [kind.restorable for kind in Consistency] == [False, True, True]

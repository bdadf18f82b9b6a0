import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.bookmark import Stamp
from replication.errors import PeerError
from replication.stream import (
    Refusal,
    StreamState,
    commit_path,
    segment_path,
    state_path,
)
from tests.replication.samples import MACHINE, quick, uint63, words
from tests.replication.test_watermark import watermarks

states = st.builds(
    StreamState,
    committed=st.builds(Stamp, st.integers(0, (1 << 32) - 1), uint63),
    attempt=st.binary(min_size=16, max_size=16),
    durable_ns=uint63,
    time_ns=uint63,
    watermark=watermarks,
)
refusals = st.builds(Refusal, words, words, words)


@quick
@given(states)
def test_state_round_trips(state: StreamState) -> None:
    assert StreamState.from_bytes(state.to_bytes()) == state


@quick
@given(refusals)
def test_refusal_round_trips(refusal: Refusal) -> None:
    assert Refusal.from_bytes(refusal.to_bytes()) == refusal


@quick
@given(states, st.data())
def test_damaged_state_is_refused_or_is_a_state(state: StreamState, data: st.DataObject) -> None:
    whole = bytearray(state.to_bytes())
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    try:
        assert isinstance(StreamState.from_bytes(bytes(whole)), StreamState)
    except PeerError:
        return


@quick
@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(PeerError):
        StreamState.from_bytes(garbage)
    with pytest.raises(PeerError):
        Refusal.from_bytes(garbage)


def test_paths_are_those_of_the_page() -> None:
    changeset = f"/v1/machines/{MACHINE}/generations/3/changesets/9"
    assert segment_path(MACHINE, Stamp(3, 9), 4) == f"{changeset}/segments/4"
    assert commit_path(MACHINE, Stamp(3, 9)) == f"{changeset}/commit"
    assert state_path(MACHINE) == f"/v1/machines/{MACHINE}/state"

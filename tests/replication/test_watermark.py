import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.bookmark import Stamp
from replication.document import encode
from replication.errors import PeerError
from replication.watermark import (
    REPAIR_RUNS_MAX,
    WANTED_COUNT_MAX,
    WATERMARK_BYTES_MAX,
    Repair,
    RepairRun,
    Watermark,
)
from tests.replication.samples import MACHINE, quick, uint63, words

repairs = st.builds(
    Repair,
    uint63,
    st.lists(st.builds(RepairRun, st.integers(0, 63), uint63, uint63), max_size=4).map(tuple),
)
watermarks = st.builds(
    Watermark,
    machine=st.uuids(),
    applied=st.builds(Stamp, st.integers(0, (1 << 32) - 1), uint63),
    attempt=st.binary(min_size=16, max_size=16),
    restorable_ns=uint63,
    wanted=st.lists(words, max_size=4).map(tuple),
    repair=repairs,
    lost=words,
    lost_generation=st.integers(0, (1 << 32) - 1),
)


@quick
@given(watermarks)
def test_watermark_round_trips(made: Watermark) -> None:
    assert Watermark.from_bytes(made.to_bytes()) == made


@quick
@given(watermarks, st.data())
def test_damage_is_refused_or_is_a_watermark(made: Watermark, data: st.DataObject) -> None:
    whole = bytearray(made.to_bytes())
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    try:
        found = Watermark.from_bytes(bytes(whole))
    except PeerError:
        return
    assert isinstance(found, Watermark)


@quick
@given(st.binary(max_size=200))
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(PeerError):
        Watermark.from_bytes(garbage)


def test_fullest_watermark_fits_its_limit() -> None:
    most = (1 << 63) - 1
    name = "segment/000000000001/00112233445566778899aabbccddeeff/000001"
    made = Watermark(
        MACHINE,
        Stamp((1 << 32) - 1, most),
        wanted=(name,) * WANTED_COUNT_MAX,
        repair=Repair(most, (RepairRun(63, most, most),) * REPAIR_RUNS_MAX),
        lost="x" * 4096,
    )
    data = made.to_bytes()
    assert len(data) < WATERMARK_BYTES_MAX
    assert Watermark.from_bytes(data) == made


@pytest.mark.parametrize(
    "wrong",
    [
        {"wanted": ["x"] * (WANTED_COUNT_MAX + 1)},
        {"repair_runs": [{"disk": 0, "block": 0, "count": 1}] * (REPAIR_RUNS_MAX + 1)},
        {"repair_runs": [{"disk": 64, "block": 0, "count": 1}]},
        {"repair_runs": [{"disk": 0, "block": -1, "count": 1}]},
        {"attempt": "00"},
        {"generation": 1 << 32},
        {"machine": "x"},
        {"lost": None},
    ],
)
def test_too_much_or_senseless_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(PeerError):
        Watermark.from_bytes(encode(Watermark(MACHINE).to_tree() | wrong))

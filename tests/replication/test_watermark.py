import hashlib
import hmac
import json
import uuid

import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from replication.bookmark import Stamp
from replication.document import encode
from replication.errors import PeerError
from replication.stream import StreamState
from replication.watermark import (
    REPAIR_RUNS_MAX,
    WANTED_COUNT_MAX,
    WATERMARK_BYTES_MAX,
    Repair,
    RepairRun,
    Watermark,
    WatermarkKey,
)
from tests.replication.samples import DATA_KEY, MACHINE, quick, uint63, words

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
    lost_cause=st.sampled_from(["", "integrity", "stream-lost"]),
    sums=st.binary(min_size=16, max_size=16),
)
KEY = WatermarkKey(DATA_KEY, MACHINE)


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
@given(watermarks)
def test_signed_watermark_is_authentic_as_it_is_and_passed_on(made: Watermark) -> None:
    signed = made.signed(KEY)
    assert signed.is_authentic(KEY)
    assert not made.is_authentic(KEY)
    read = Watermark.from_bytes(signed.to_bytes())
    assert read == signed
    assert read.is_authentic(KEY)
    assert read.to_bytes() == signed.to_bytes()


@quick
@given(watermarks, st.data())
def test_no_flipped_bit_is_authentic(made: Watermark, data: st.DataObject) -> None:
    whole = bytearray(made.signed(KEY).to_bytes())
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    try:
        found = Watermark.from_bytes(bytes(whole))
    except PeerError:
        return
    # Only the case of a hexadecimal digit of the code itself changes nothing.
    assert not found.is_authentic(KEY) or found == made.signed(KEY)


def test_watermark_of_another_machine_or_key_is_not_authentic() -> None:
    made = Watermark(MACHINE, Stamp(1, 2)).signed(KEY)
    assert not made.is_authentic(WatermarkKey(bytes(32), MACHINE))
    assert not made.is_authentic(WatermarkKey(DATA_KEY, uuid.UUID(int=3)))
    assert not Watermark(MACHINE).is_authentic(KEY)


def test_process_server_passes_on_what_it_does_not_know() -> None:
    tree = Watermark(MACHINE, Stamp(1, 2)).to_tree() | {"new": {"later": [1, "ä"]}}
    tree["mac"] = KEY.mac(tree).hex()
    read = Watermark.from_bytes(encode(tree))
    assert read.is_authentic(KEY)
    state = StreamState(Stamp(1, 2), bytes(16), 0, 0, read)
    passed_on = StreamState.from_bytes(state.to_bytes()).watermark
    assert passed_on.is_authentic(KEY)
    assert passed_on.to_tree() == tree


def test_document_of_an_older_applier_is_read_and_not_authentic() -> None:
    tree = Watermark(MACHINE, Stamp(1, 2)).to_tree()
    for key in ("lost_cause", "sums"):
        del tree[key]
    assert "mac" not in tree
    read = Watermark.from_bytes(encode(tree))
    assert read.applied == Stamp(1, 2)
    assert not read.is_authentic(KEY)


def test_code_is_what_the_page_says() -> None:
    made = Watermark(MACHINE, Stamp(1, 2), lost="weiß").signed(KEY)
    info = b"understudy watermark v1" + MACHINE.bytes
    key = HKDF(SHA256(), 32, None, info).derive(DATA_KEY)
    tree = json.loads(made.to_bytes())
    mac = tree.pop("mac")
    text = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    assert mac == hmac.new(key, text, hashlib.sha256).hexdigest()


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

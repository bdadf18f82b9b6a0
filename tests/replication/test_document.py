import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.document import UINT_MAX, Document, encode
from replication.errors import PeerError
from tests.replication.samples import quick

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)

READERS: dict[str, Callable[[Document], Any]] = {
    "uint": lambda tree: tree.uint("key"),
    "text": lambda tree: tree.text("key", 10),
    "flag": lambda tree: tree.flag("key"),
    "hex": lambda tree: tree.hex("key", 4),
    "documents": lambda tree: tree.documents("key", 2),
    "document": lambda tree: tree.document("key"),
    "texts": lambda tree: tree.texts("key", 2),
}

WRONG: dict[str, list[Any]] = {
    "uint": [-1, UINT_MAX + 1, 1.0, True, "1", None, [], {}],
    "text": ["x" * 11, 1, None, [], True],
    "flag": [0, 1, "true", None],
    "hex": ["", "00", "0" * 7, "0" * 9, "zz" * 4, "00 00 00", "é" * 8, 0, None],
    "documents": [{}, [1], [{}, {}, {}], "ab", None],
    "document": [[], 1, None, "x"],
    "texts": [["a", 1], ["a", "b", "c"], "ab", {}, None],
}


def refusal_of(read: Callable[[], object]) -> str | None:
    """Why it was refused; any other exception passes."""
    try:
        read()
    except PeerError as error:
        return str(error)
    return None


@pytest.mark.parametrize("reader", READERS)
def test_wrong_types_and_sizes_are_told_with_the_key(reader: str) -> None:
    for value in WRONG[reader]:
        with pytest.raises(PeerError, match=r"part\.key"):
            READERS[reader](Document({"key": value}, "part"))
    with pytest.raises(PeerError, match="key is missing"):
        READERS[reader](Document({}, "part"))


@quick
@given(json_values, st.sampled_from(sorted(READERS)))
def test_any_json_is_read_or_refused(value: Any, reader: str) -> None:
    data = json.dumps({"key": value}).encode()
    tree = Document.decode(data, "part", bytes_max=1 << 20)
    refusal = refusal_of(lambda: READERS[reader](tree))
    assert refusal is None or len(refusal) < 300


@quick
@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    refusal = refusal_of(lambda: Document.decode(data, "part", bytes_max=1000))
    assert refusal is None or refusal.startswith("part: ")


def test_too_long_too_deep_and_too_big_numbers_are_refused() -> None:
    with pytest.raises(PeerError, match="more than 5"):
        Document.decode(b'{"a":1}', "part", bytes_max=5)
    deep = b'{"key":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(PeerError, match="not JSON"):
        Document.decode(deep, "part", bytes_max=1 << 20)
    with pytest.raises(PeerError, match="not JSON"):
        Document.decode(b'{"key":' + b"9" * 10_000 + b"}", "part", bytes_max=1 << 20)


def test_only_utf8_is_read() -> None:
    for encoding in ("utf-16", "utf-32", "utf-16-le"):
        with pytest.raises(PeerError):
            Document.decode('{"key":1}'.encode(encoding), "part", bytes_max=1000)
    with pytest.raises(PeerError):
        Document.decode(b'{"key":"\xff"}', "part", bytes_max=1000)


def test_half_a_surrogate_pair_is_no_text() -> None:
    tree = Document.decode(b'{"key":"\\ud800","list":["\\udc00"]}', "part", bytes_max=1000)
    with pytest.raises(PeerError):
        tree.text("key")
    with pytest.raises(PeerError):
        tree.texts("list", 1)


def test_encoding_is_canonical() -> None:
    assert encode({"b": 1, "a": "é"}) == b'{"a":"\\u00e9","b":1}'

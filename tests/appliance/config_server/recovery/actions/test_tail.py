"""The end of an output."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.recovery.actions.tail import Tail


@given(st.lists(st.binary(max_size=40)), st.integers(1, 50))
def test_the_last_bytes_are_kept_and_the_rest_is_counted(parts: list[bytes], size: int) -> None:
    tail = Tail(size)
    for part in parts:
        tail.take(part)
        assert sum(map(len, tail._parts)) <= 2 * size
    whole = b"".join(parts)
    told = whole[-size:].decode(errors="replace").replace("\0", "\ufffd")
    assert tail.taken == len(whole)
    assert tail.text().endswith(told)
    assert tail.text().startswith("(") == (len(whole) > size) or told.startswith("(")

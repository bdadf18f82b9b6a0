import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config_server.identity.vault_key import VaultKey
from replication.errors import IntegrityError

KEY = VaultKey(bytes(32))


@given(st.binary(max_size=300), st.text(max_size=20), st.text(max_size=20))
def test_what_was_sealed_opens_in_its_place_alone(secret: bytes, table: str, row: str) -> None:
    sealed = KEY.seal(secret, table, row)
    assert KEY.open(sealed, table, row) == secret
    for place in ((table + "x", row), (table, row + "x"), (table + row, "")):
        if place != (table, row):
            with pytest.raises(IntegrityError):
                KEY.open(sealed, *place)


@given(st.binary(min_size=1, max_size=60), st.integers(0, 10**6))
def test_any_bit_changed_is_refused(secret: bytes, bit: int) -> None:
    sealed = bytearray(KEY.seal(secret, "t", "r"))
    bit %= len(sealed) * 8
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(IntegrityError):
        KEY.open(bytes(sealed), "t", "r")


@pytest.mark.parametrize("size", [0, 1, 12, 13, 28])
def test_what_is_too_short_is_refused(size: int) -> None:
    with pytest.raises(IntegrityError):
        KEY.open(KEY.seal(b"secret", "t", "r")[:size], "t", "r")


def test_the_same_secret_is_never_sealed_the_same_way() -> None:
    assert KEY.seal(b"secret", "t", "r") != KEY.seal(b"secret", "t", "r")


def test_another_key_opens_nothing_and_no_key_is_shown() -> None:
    with pytest.raises(IntegrityError, match="same config server"):
        VaultKey.create().open(KEY.seal(b"secret", "t", "r"), "t", "r")
    assert "00" not in repr(KEY)
    assert KEY.derive("a") != KEY.derive("b")

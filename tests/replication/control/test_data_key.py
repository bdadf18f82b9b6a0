import uuid

import pytest
from pydantic import ValidationError

from replication.control.data_key import GivenDataKey

MACHINE = uuid.UUID(int=7)


def test_a_key_is_32_bytes_and_is_not_shown() -> None:
    given = GivenDataKey(machine=MACHINE, data_key="ab" * 32)
    assert given.key() == b"\xab" * 32
    assert "abab" not in repr(given)


@pytest.mark.parametrize("key", ["ab" * 31, "ab" * 33, "AB" * 32, "zz" * 32, ""])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(ValidationError):
        GivenDataKey(machine=MACHINE, data_key=key)

import pytest

from replication import errors
from replication.errors import IntegrityError, ReplicationError

CLASSES = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, ReplicationError)
]


def test_every_error_is_explained_to_operators() -> None:
    assert len(CLASSES) >= 8
    for found in CLASSES:
        assert found.__doc__ is not None
        assert found.__doc__.endswith(".")


def test_codes_are_unique_and_exit_codes_are_no_success() -> None:
    codes = [found.code for found in CLASSES]
    assert len(set(codes)) == len(codes)
    assert all(1 <= found.exit_code < 64 for found in CLASSES)


def test_damaged_bytes_are_never_tried_again() -> None:
    assert not IntegrityError.retryable


@pytest.mark.parametrize("found", CLASSES)
def test_hint_follows_the_message(found: type[ReplicationError]) -> None:
    assert str(found("no room", hint="free some")) == "no room (free some)"
    assert str(found("no room")) == "no room"

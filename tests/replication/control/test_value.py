from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from replication.control.value import COUNT_MAX, SECONDS_MAX, Count, Difference, Seconds, Text


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Count, (0, COUNT_MAX), (-1, COUNT_MAX + 1)),
        (Difference, (-COUNT_MAX, COUNT_MAX), (-COUNT_MAX - 1, COUNT_MAX + 1)),
        (Seconds, (0.0, SECONDS_MAX), (-0.1, 2 * SECONDS_MAX, float("inf"), float("nan"))),
        (Text, ("", "ä" * 2000), ("a\0b", "a" * 2001)),
    ],
)
def test_values_are_what_a_column_takes(
    kind: Any, good: tuple[object, ...], bad: tuple[object, ...]
) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    for value in good:
        assert adapter.validate_python(value) == value
    for value in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)

import pytest
from pydantic import ValidationError

from replication.control.message import Message


class Greeting(Message):
    text: str


def test_what_a_newer_side_adds_is_passed_over() -> None:
    assert Greeting.model_validate_json('{"text": "hi", "volume": 3}') == Greeting(text="hi")


def test_a_message_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Greeting(text="hi").text = "bye"

"""JSON that crosses process boundaries, read strictly: what is off is a PeerError.

Not a schema language: each record reads its own fields, in the order that it declares them.
Unknown keys are passed over, so that a newer peer may add some.
"""

import json
from collections.abc import Sequence
from typing import Any

from replication.errors import PeerError

UINT_MAX = (1 << 63) - 1


def encode(tree: dict[str, Any]) -> bytes:
    """One canonical form: sorted keys, no spaces, UTF-8."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()


class Document:
    """One JSON object whose fields are asked for by name and type."""

    def __init__(self, tree: Any, where: str) -> None:
        if not isinstance(tree, dict):
            raise PeerError(f"{where}: an object was expected, not {type(tree).__name__}")
        self._tree: dict[str, Any] = tree
        self._where = where

    @property
    def tree(self) -> dict[str, Any]:
        """The object itself, for a record that reads all of it."""
        return self._tree

    @classmethod
    def decode(cls, data: bytes, where: str, *, bytes_max: int) -> "Document":
        if len(data) > bytes_max:
            raise PeerError(f"{where}: {len(data)} bytes are more than {bytes_max}")
        try:
            return cls(json.loads(data.decode()), where)
        except (ValueError, RecursionError) as error:
            raise PeerError(f"{where}: not JSON: {error}") from error

    def uint(self, key: str, most: int = UINT_MAX) -> int:
        value = self._get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise self._wrong(key, f"a whole number from 0 to {most}")
        return value

    def text(self, key: str, chars_max: int = 4096) -> str:
        value = self._get(key)
        if not _is_text(value) or len(value) > chars_max:
            raise self._wrong(key, f"a text of at most {chars_max} characters")
        return str(value)

    def flag(self, key: str) -> bool:
        value = self._get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def hex(self, key: str, size_bytes: int) -> bytes:
        value = self.text(key, 2 * size_bytes)
        try:
            found = bytes.fromhex(value)
        except ValueError:
            found = b""
        if len(found) != size_bytes:
            raise self._wrong(key, f"{size_bytes} bytes in hexadecimal")
        return found

    def documents(self, key: str, count_max: int) -> "list[Document]":
        return [
            Document(item, f"{self._where}.{key}[{index}]")
            for index, item in enumerate(self._list(key, count_max))
        ]

    def document(self, key: str) -> "Document":
        return Document(self._get(key), f"{self._where}.{key}")

    def texts(self, key: str, count_max: int) -> list[str]:
        items = self._list(key, count_max)
        if not all(_is_text(item) for item in items):
            raise self._wrong(key, "a list of texts")
        return list(items)

    def __contains__(self, key: str) -> bool:
        return self._tree.get(key) is not None

    def _list(self, key: str, count_max: int) -> Sequence[Any]:
        value = self._get(key)
        if not isinstance(value, list) or len(value) > count_max:
            raise self._wrong(key, f"a list of at most {count_max}")
        return value

    def _get(self, key: str) -> Any:
        if key not in self._tree:
            raise PeerError(f"{self._where}: {key} is missing")
        return self._tree[key]

    def _wrong(self, key: str, expected: str) -> PeerError:
        return PeerError(
            f"{self._where}.{key}: {expected} was expected, not {self._tree[key]!r:.80}"
        )


def _is_text(value: Any) -> bool:
    """Whether it is a string that can be written as UTF-8: JSON can spell half a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False

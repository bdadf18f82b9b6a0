"""Lists in pages. A cursor holds the key of the last row that was given out: rows that come and go
meanwhile neither shift nor repeat the others.

Source: docs/CONTROL.md §6.
"""

import base64
import binascii
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Query
from pydantic import BaseModel
from sqlalchemy import Select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from replication.errors import InputError

LIMIT_DEFAULT = 100
LIMIT_MAX = 500
CURSOR_CHARS_MAX = 2048
_INTEGER_MAX = 2**63 - 1

Item = TypeVar("Item")
Row = TypeVar("Row")


class Page(BaseModel, Generic[Item]):
    """Some items of a list. ``next`` is the cursor of the page behind, none on the last."""

    items: list[Item]
    next: str | None = None


@dataclass(frozen=True, slots=True)
class Paging:
    """What part of a list is asked for."""

    limit: int = LIMIT_DEFAULT
    cursor: str | None = None


async def _paging(  # async, or FastAPI would hand it to a thread
    limit: Annotated[int, Query(ge=1, le=LIMIT_MAX)] = LIMIT_DEFAULT,
    cursor: Annotated[str | None, Query(max_length=CURSOR_CHARS_MAX)] = None,
) -> Paging:
    return Paging(limit, cursor)


PagingOf = Annotated[Paging, Depends(_paging)]
"""The parameter of a route that lists: ``paging: PagingOf``."""


async def read_page(
    session: AsyncSession,
    statement: Select[Row],
    keys: Sequence[InstrumentedAttribute[Any]],
    paging: Paging,
    *,
    descending: bool = False,
) -> tuple[Sequence[Row], str | None]:
    """The rows of a page in the order of ``keys``, and the cursor of the next one.

    keys: columns of the selected table that are unique together; strings, integers, UUIDs.
    Raises InputError for a cursor that is not one of this list's.
    """
    columns = tuple_(*keys)
    if paging.cursor is not None:
        after = tuple_(*decode_cursor(paging.cursor, [_kind(key) for key in keys]))
        statement = statement.where(columns < after if descending else columns > after)
    ordered = statement.order_by(*(key.desc() if descending else key.asc() for key in keys))
    rows = (await session.scalars(ordered.limit(paging.limit + 1))).all()
    if len(rows) <= paging.limit:
        return rows, None
    rows = rows[: paging.limit]
    return rows, encode_cursor([getattr(rows[-1], key.key) for key in keys])


def _kind(key: InstrumentedAttribute[Any]) -> type:
    kind: type = key.type.python_type
    assert kind in (str, int, uuid.UUID)
    return kind


def encode_cursor(values: Sequence[str | int | uuid.UUID]) -> str:
    """The key of a row as a cursor."""
    plain = [str(value) if isinstance(value, uuid.UUID) else value for value in values]
    packed = json.dumps(plain, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(packed).decode().rstrip("=")


def decode_cursor(cursor: str, kinds: Sequence[type]) -> list[Any]:
    """The key that a cursor holds, its values of ``kinds``."""
    try:
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        values = json.loads(packed)
        return [_checked(value, kind) for value, kind in zip(_listed(values), kinds, strict=True)]
    except (ValueError, TypeError, RecursionError, binascii.Error) as error:
        raise InputError(
            "query.cursor: not a cursor of this list", hint="pass on what `next` said"
        ) from error


def _listed(values: object) -> list[object]:
    if not isinstance(values, list):
        raise TypeError(values)
    return values


def _checked(value: object, kind: type) -> object:
    if kind is uuid.UUID and isinstance(value, str):
        return uuid.UUID(value)
    if kind is int and type(value) is int and abs(value) <= _INTEGER_MAX:
        return value
    if kind is str and isinstance(value, str) and "\0" not in value:
        value.encode()  # a lone surrogate is no text
        return value
    raise ValueError(value)

"""Pages over rows that come and go, on both databases; cursors of all kinds."""

import base64
import json
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete, select

from appliance.config_server.api.paging import Paging, decode_cursor, encode_cursor, read_page
from appliance.config_server.store.engine import Database, open_database
from appliance.config_server.store.schema import Token, VirtualMachine
from replication.errors import InputError
from tests.appliance.config_server.running import open_rig

INTEGERS = st.integers(-(2**63) + 1, 2**63 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=50)


@given(TEXTS, INTEGERS, st.uuids())
def test_a_cursor_gives_back_its_key(text: str, integer: int, identity: uuid.UUID) -> None:
    cursor = encode_cursor([text, integer, identity])
    assert decode_cursor(cursor, [str, int, uuid.UUID]) == [text, integer, identity]
    assert cursor.isascii()
    assert "=" not in cursor


@given(st.text(max_size=60))
def test_what_is_no_cursor_is_the_caller_s_fault(cursor: str) -> None:
    with pytest.raises(InputError):
        decode_cursor(cursor, [uuid.UUID])


@pytest.mark.parametrize(
    "key",
    [[], ["a", "b"], [1], [None], {"a": 1}, "a", ["a\0"], ["\ud800"], [["a"]], 5],
)
def test_a_cursor_of_another_list_is_the_caller_s_fault(key: object) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(key).encode()).decode()
    with pytest.raises(InputError):
        decode_cursor(cursor, [str])


@pytest.mark.parametrize("key", [[2**63], [True], [1.5], ["1"], [-(2**70)]])
def test_a_number_beyond_the_database_s_is_the_caller_s_fault(key: object) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(key).encode()).decode()
    with pytest.raises(InputError):
        decode_cursor(cursor, [int])


def test_a_cursor_nested_without_end_is_the_caller_s_fault() -> None:
    cursor = base64.urlsafe_b64encode(b"[" * 1500).decode()
    with pytest.raises(InputError):
        decode_cursor(cursor, [str])


def _token(name: str) -> Token:
    return Token(
        id=uuid.uuid4(),
        name=name,
        role="reader",
        digest=uuid.uuid4().hex,
        created_ns=1,
        expires_ns=2,
    )


async def _pages(database: Database, limit: int, *, descending: bool = False) -> list[list[str]]:
    pages, cursor = [], None
    while True:
        async with database.reading() as session:
            rows, cursor = await read_page(
                session, select(Token), [Token.name], Paging(limit, cursor), descending=descending
            )
        pages.append([row.name for row in rows])
        if cursor is None:
            return pages


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 14, 15])
async def test_pages_hold_each_row_once_in_order(database_url: str, count: int) -> None:
    async with open_database(database_url) as database:
        async with database.writing() as session:
            session.add_all(_token(f"t{index:03}") for index in range(count))
        expected = [f"t{index:03}" for index in range(count)]
        pages = await _pages(database, 7)
        assert [name for page in pages for name in page] == expected
        assert all(len(page) == 7 for page in pages[:-1])
        pages = await _pages(database, 7, descending=True)
        assert [name for page in pages for name in page] == expected[::-1]


async def test_rows_that_come_and_go_neither_shift_nor_repeat_others(database_url: str) -> None:
    async with open_database(database_url) as database:
        async with database.writing() as session:
            session.add_all(_token(f"t{index:03}") for index in range(0, 40, 2))
        async with database.reading() as session:
            rows, cursor = await read_page(session, select(Token), [Token.name], Paging(5))
        seen = [row.name for row in rows]
        async with database.writing() as session:
            await session.execute(delete(Token).where(Token.name.in_(["t000", "t008", "t010"])))
            session.add_all([_token("t001"), _token("t011")])
        while cursor is not None:
            async with database.reading() as session:
                rows, cursor = await read_page(
                    session, select(Token), [Token.name], Paging(5, cursor)
                )
            seen += [row.name for row in rows]
        gone = {"t010"}
        assert seen == sorted({f"t{index:03}" for index in range(0, 40, 2)} - gone | {"t011"})


async def test_keys_of_several_columns_order_together(database_url: str) -> None:
    """Names repeat; the identity behind them decides."""
    keys = [VirtualMachine.name, VirtualMachine.id]
    statement = select(VirtualMachine)
    async with open_database(database_url) as database, database.reading() as session:
        cursor = encode_cursor(["a", uuid.uuid4()])
        assert await read_page(session, statement, keys, Paging(3, cursor)) == ([], None)


@pytest.mark.parametrize("query", ["limit=0", "limit=501", "limit=x", "cursor=%00", "cursor=!"])
async def test_a_wrong_page_is_refused_by_the_api(tmp_path: Path, query: str) -> None:
    async with open_rig(tmp_path) as rig:
        told = await rig.operator().get(f"tokens?{query}")
        assert (told.status_code, told.json()["code"]) == (422, "invalid")

"""``events``: what a person should know, open or over.

Source: docs/CONTROL.md §10.
"""

import uuid
from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel
from sqlalchemy import or_, select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Count64, Router, ServerOf
from appliance.config_server.caller import NAME_CHARS_MAX, Caller
from appliance.config_server.store.schema import Event
from replication.control.role import OperatorRole

router = Router("events")


class EventDocument(BaseModel):
    """An event; open until ``cleared_ns``. Times in nanoseconds since 1970.

    source_id, source: the machine or component that it is about.
    """

    id: int
    at_ns: int
    code: str
    severity: str
    source_id: uuid.UUID | None
    source: str
    message: str
    cause: str
    action: str
    cleared_ns: int | None
    mailed_ns: int | None


@router.get("")
async def list_events(
    server: ServerOf,
    paging: PagingOf,
    _: Annotated[Caller, needs(OperatorRole.READER)],
    *,
    since_ns: Annotated[Count64 | None, Query(description="Opened or cleared since.")] = None,
    severity: Literal["warning", "critical"] | None = None,
    machine: Annotated[
        str | None,
        Query(min_length=1, max_length=NAME_CHARS_MAX, description="Or component: id or name."),
    ] = None,
    is_open: Annotated[bool | None, Query(alias="open")] = None,
) -> Page[EventDocument]:
    """List events, newest first."""
    query = select(Event)
    if since_ns is not None:
        query = query.where(or_(Event.at_ns >= since_ns, Event.cleared_ns >= since_ns))
    if severity is not None:
        query = query.where(Event.severity == severity)
    if machine is not None:
        try:
            query = query.where(Event.source_id == uuid.UUID(machine))
        except ValueError:
            query = query.where(Event.source == machine)
    if is_open is not None:
        over = Event.cleared_ns.is_not(None)
        query = query.where(~over if is_open else over)
    async with server.database.reading() as session:
        rows, following = await read_page(session, query, [Event.id], paging, descending=True)
    items = [EventDocument.model_validate(row, from_attributes=True) for row in rows]
    return Page(items=items, next=following)

"""``GET audit``: who changed what, newest first."""

from typing import Annotated, Any

from pydantic import BaseModel
from sqlalchemy import select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.store.schema import AuditEntry
from replication.control.role import OperatorRole

router = Router("audit")


class AuditDocument(BaseModel):
    """A change or a refusal. ``outcome``: ``done``, or the code of the error."""

    id: int
    at_ns: int
    who: str
    role: str
    source: str
    action: str
    target: str
    outcome: str
    detail: dict[str, Any]


@router.get("")
async def list_audit(
    server: ServerOf, paging: PagingOf, _: Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]
) -> Page[AuditDocument]:
    """List the audit log, newest first."""
    async with server.database.reading() as session:
        rows, following = await read_page(
            session, select(AuditEntry), [AuditEntry.id], paging, descending=True
        )
    items = [AuditDocument.model_validate(row, from_attributes=True) for row in rows]
    return Page(items=items, next=following)

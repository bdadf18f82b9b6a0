"""``tokens``: who may use the API, and for how long."""

from http import HTTPStatus
from typing import Annotated

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Name, NameInPath, Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.store.schema import Token
from appliance.config_server.tokens import DAYS_DEFAULT, DAYS_MAX, create_token, revoke_token
from replication.control.role import OperatorRole

router = Router("tokens")
ContributorCaller = Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]


class TokenRequest(BaseModel):
    """A token to make."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    role: OperatorRole
    days: Annotated[int, Field(ge=1, le=DAYS_MAX)] = DAYS_DEFAULT


class TokenDocument(BaseModel):
    """A token; times in nanoseconds since 1970."""

    name: str
    role: OperatorRole
    created_ns: int
    created_by: str
    expires_ns: int
    revoked_ns: int | None


class CreatedToken(TokenDocument):
    """A new token. ``token`` is told this once and stored nowhere."""

    token: str


@router.get("")
async def list_tokens(
    server: ServerOf, paging: PagingOf, _: ContributorCaller
) -> Page[TokenDocument]:
    """List the tokens by name, those that are revoked or expired as well."""
    async with server.database.reading() as session:
        rows, following = await read_page(session, select(Token), [Token.name], paging)
    return Page(items=[_document(row) for row in rows], next=following)


@router.post("", status_code=HTTPStatus.CREATED)
async def create(
    server: ServerOf, caller: ContributorCaller, request: TokenRequest
) -> CreatedToken:
    """Make a token and tell it, this once."""
    detail = {"role": request.role, "days": request.days}
    async with server.change(caller, "token.create", request.name, detail) as session:
        new = await create_token(
            session,
            request.name,
            request.role,
            days=request.days,
            now_ns=server.clock(),
            created_by=caller.name,
        )
    return CreatedToken(**_document(new.row).model_dump(), token=new.secret)


@router.delete("/{name}", status_code=HTTPStatus.NO_CONTENT)
async def revoke(server: ServerOf, caller: ContributorCaller, name: NameInPath) -> Response:
    """Revoke a token; from now on it is refused."""
    async with server.change(caller, "token.revoke", name) as session:
        await revoke_token(session, name, now_ns=server.clock())
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _document(row: Token) -> TokenDocument:
    return TokenDocument(
        name=row.name,
        role=OperatorRole(row.role),
        created_ns=row.created_ns,
        created_by=row.created_by,
        expires_ns=row.expires_ns,
        revoked_ns=row.revoked_ns,
    )

"""Who may use a route. Every route says so; one that does not cannot be defined.

Checked before the body is read: who may not ask costs nothing but a look into the database.

Source: docs/CONTROL.md §3, §6; RFC 6750 (bearer tokens).
"""

from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import Depends, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from sqlalchemy import bindparam, select

from appliance.config_server.api.peer import Peer, peer_of
from appliance.config_server.caller import NOBODY, Caller
from appliance.config_server.server import Server
from appliance.config_server.store.schema import Certificate, Token
from appliance.config_server.tokens import digest_of
from replication.control.role import NodeRole, OperatorRole
from replication.errors import AccessError, UnknownCallerError

TOKEN_CHARS_MAX = 256
SAFE_METHODS = frozenset({"GET", "HEAD"})
_TOKEN = select(Token.name, Token.role, Token.expires_ns, Token.revoked_ns).where(
    Token.digest == bindparam("digest")
)
_CERTIFICATE = select(Certificate.node_id, Certificate.expires_ns, Certificate.revoked_ns).where(
    Certificate.serial == bindparam("serial")
)
_RANK = {role: rank for rank, role in enumerate(OperatorRole)}


def server_of(request: Request) -> Server:
    """The server that answers ``request``."""
    server = request.app.state.server
    assert isinstance(server, Server)
    return server


@dataclass(frozen=True, slots=True)
class Access:
    """What a route asks of its callers.

    role:  the least role of an operator; none: operators are not meant.
    nodes: roles of nodes that are let in.
    """

    role: OperatorRole | None = None
    nodes: frozenset[NodeRole] = frozenset()

    @property
    def anyone(self) -> bool:
        return self.role is None and not self.nodes

    async def admit(self, request: Request) -> Caller:
        """Raise UnknownCallerError or AccessError for who is not meant."""
        server = server_of(request)
        source = request.client.host if request.client else ""
        if self.anyone:
            return Caller(NOBODY, None, source)
        caller = Caller(NOBODY, None, source)
        try:
            if self.nodes:
                caller = await _node(server, peer_of(request), source)
            else:
                caller = await _operator(server, request.headers.get("authorization"), source)
            self._check_role(caller)
        except AccessError as error:
            if request.method not in SAFE_METHODS:
                action = f"{request.method} {request.scope['route'].path}"
                await server.audit.refused(caller, action, request.url.path, error.code)
            raise
        return caller

    def _check_role(self, caller: Caller) -> None:
        if self.role is None:
            allowed = caller.role in self.nodes
        else:
            assert isinstance(caller.role, OperatorRole)
            allowed = _RANK[caller.role] >= _RANK[self.role]
        if not allowed:
            raise AccessError(
                f"{caller.role} may not do this",
                hint=f"it takes {self.role or ' or '.join(sorted(self.nodes))}",
            )

    async def __call__(self, request: Request) -> Caller:
        """The dependency: who was admitted."""
        caller = request.state.caller
        assert isinstance(caller, Caller)
        return caller


def needs(role: OperatorRole) -> Any:
    """A dependency: an operator with a token of at least ``role``."""
    return Depends(Access(role=role))


def needs_node(*roles: NodeRole) -> Any:
    """A dependency: a node with a certificate of one of ``roles``; of any role if none is named."""
    return Depends(Access(nodes=frozenset(roles or NodeRole)))


def anyone() -> Any:
    """A dependency: whoever reaches the port."""
    return Depends(Access())


class GuardedRoute(APIRoute):
    """A route that admits its caller before anything else is done."""

    access: Access

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        found = {
            dependant.call
            for dependant in _flat(self.dependant)
            if isinstance(dependant.call, Access)
        }
        if len(found) != 1:
            raise AssertionError(
                f"{self.path} must say once who may use it, not {len(found)} times"
            )
        access = self.access = found.pop()
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            request.state.caller = await access.admit(request)
            return await handle(request)

        return guarded


def _flat(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for below in dependant.dependencies:
        yield from _flat(below)


async def _operator(server: Server, header: str | None, source: str) -> Caller:
    if header is None:
        raise UnknownCallerError(
            "this needs a token", hint="send the header Authorization: Bearer TOKEN"
        )
    server.attempts.check(source)
    scheme, _, token = header.partition(" ")
    row = None
    if scheme.lower() == "bearer" and len(token) <= TOKEN_CHARS_MAX:
        row = await server.database.look_up(_TOKEN, digest=digest_of(token.strip()))
    if row is None or row.revoked_ns is not None or row.expires_ns <= server.clock():
        server.attempts.failed(source)
        raise UnknownCallerError(
            "the token is unknown, expired or revoked",
            hint="a Contributor makes a new one with `understudy tokens create`",
        )
    return Caller(row.name, OperatorRole(row.role), source)


async def _node(server: Server, peer: Peer | None, source: str) -> Caller:
    if peer is None:
        raise UnknownCallerError(
            "this needs a node's certificate", hint="enrol the node with the config server"
        )
    row = await server.database.look_up(_CERTIFICATE, serial=peer.serial)
    if (
        row is None
        or row.node_id != peer.node
        or row.revoked_ns is not None
        or row.expires_ns <= server.clock()
    ):
        raise UnknownCallerError(
            f"the certificate {peer.serial} is not of this CA's, expired or revoked",
            hint="enrol the node again",
        )
    return Caller(str(peer.node), peer.role, source, peer.node, peer.serial)

"""How routes are declared, and the types that their parameters share."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from pydantic import Field, StringConstraints

from appliance.config_server.api.access import GuardedRoute, server_of
from appliance.config_server.api.errors import RESPONSES
from appliance.config_server.caller import NAME_CHARS_MAX, NAME_PATTERN
from appliance.config_server.server import Server

PREFIX = "/api/v1"


async def _server(request: Request) -> Server:
    """Not ``server_of`` itself: FastAPI hands what is not async to a thread."""
    return server_of(request)


ServerOf = Annotated[Server, Depends(_server)]
"""The parameter of a route that reaches the server: ``server: ServerOf``."""

Name = Annotated[
    str, StringConstraints(min_length=1, max_length=NAME_CHARS_MAX, pattern=NAME_PATTERN)
]
"""A name that people choose: of a token, a policy, a vCenter."""

NameInPath = Annotated[str, Path(min_length=1, max_length=NAME_CHARS_MAX, pattern=NAME_PATTERN)]
Count64 = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""A number that a database's column takes."""


class Router(APIRouter):
    """The routes of one noun, below ``/api/v1/<noun>``; of none: below ``/api/v1``."""

    def __init__(self, noun: str = "") -> None:
        super().__init__(
            prefix=f"{PREFIX}/{noun}" if noun else PREFIX,
            tags=[noun or "server"],
            route_class=GuardedRoute,
            responses=RESPONSES,
            redirect_slashes=False,
        )

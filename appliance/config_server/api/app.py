"""The API as an ASGI application over a Server, and its OpenAPI document.

Source: docs/CONTROL.md §6; spec.openapis.org/oas/v3.1.0.
"""

from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse

from appliance.config_server.api.access import Access, GuardedRoute, anyone
from appliance.config_server.api.errors import answer_errors
from appliance.config_server.api.limiting import Limiting
from appliance.config_server.api.measuring import Measuring
from appliance.config_server.api.router import PREFIX, Router
from appliance.config_server.api.routes import ROUTERS
from appliance.config_server.server import Server

OPENAPI_PATH = f"{PREFIX}/openapi.json"
_TOKEN, _CERTIFICATE = "token", "certificate"
_SCHEMES: dict[str, Any] = {
    _TOKEN: {"type": "http", "scheme": "bearer", "description": "an operator's token"},
    _CERTIFICATE: {"type": "mutualTLS", "description": "a node's certificate of our CA"},
}

_document = Router()


@_document.get("/openapi.json", include_in_schema=False, dependencies=[anyone()])
async def openapi_document(request: Request) -> JSONResponse:
    """Serve the OpenAPI document."""
    return JSONResponse(request.app.openapi())


def create_app(server: Server) -> FastAPI:
    """The API of ``server``."""
    app = FastAPI(
        title="Understudy config server",
        version="1",
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = server
    for router in (_document, *ROUTERS):
        # Not included but taken over: what is guarded stays the very route that is served.
        app.router.routes.extend(router.routes)
    generate = app.openapi

    @cache
    def describe() -> dict[str, Any]:
        return _with_access(generate(), guarded_routes(app))

    app.openapi = describe  # type: ignore[method-assign]
    app.add_middleware(Limiting, limits=server.config.limits)
    answer_errors(app)
    app.add_middleware(Measuring, measures=server.watching.measures)
    return app


def guarded_routes(app: FastAPI) -> list[GuardedRoute]:
    """All routes there are."""
    routes = [route for route in app.routes if isinstance(route, GuardedRoute)]
    assert len(routes) == len(app.routes)
    return routes


def _with_access(document: dict[str, Any], routes: list[GuardedRoute]) -> dict[str, Any]:
    """``document`` with what each route asks of its callers."""
    document.setdefault("components", {})["securitySchemes"] = _SCHEMES
    for route in routes:
        for method in route.methods or ():
            operation = document["paths"].get(route.path_format, {}).get(method.lower())
            if operation is not None:
                operation["security"] = _security(route.access)
                operation["x-roles"] = _roles(route.access)
    return document


def _security(access: Access) -> list[dict[str, list[str]]]:
    if access.anyone:
        return []
    return [{_CERTIFICATE if access.nodes else _TOKEN: []}]


def _roles(access: Access) -> list[str]:
    return sorted(access.nodes) if access.nodes else [access.role] if access.role else []

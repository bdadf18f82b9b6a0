"""One shape for every error of the API, whatever raises it.

Source: docs/CONTROL.md §6.
"""

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from replication.errors import (
    AccessError,
    ConfigError,
    ConflictError,
    InputError,
    LimitError,
    NotFoundError,
    ReplicationError,
    StorageError,
    UnavailableError,
    UnknownCallerError,
)

STATUS: Mapping[type[ReplicationError], HTTPStatus] = {
    InputError: HTTPStatus.UNPROCESSABLE_ENTITY,
    ConfigError: HTTPStatus.UNPROCESSABLE_ENTITY,
    UnknownCallerError: HTTPStatus.UNAUTHORIZED,
    AccessError: HTTPStatus.FORBIDDEN,
    NotFoundError: HTTPStatus.NOT_FOUND,
    ConflictError: HTTPStatus.CONFLICT,
    LimitError: HTTPStatus.TOO_MANY_REQUESTS,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    StorageError: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Nearest class first along an error's bases; what is not here is a 500."""

_CODES: Mapping[int, str] = {
    400: "malformed",
    401: "unauthenticated",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    422: "invalid",
    431: "too_large",
    503: "unavailable",
}
RETRY_AFTER_SECONDS = 1


class ErrorDocument(BaseModel):
    """What every refusal says.

    code:    for programs. message: what, where and what was expected. hint: what to do.
    details: more for programs; ``problems`` lists what is wrong with a request, place by place.
    """

    model_config = ConfigDict(extra="forbid")

    code: str
    message: str
    hint: str | None = None
    details: dict[str, Any] = {}


RESPONSES: dict[int | str, dict[str, Any]] = {
    int(status): {"model": ErrorDocument, "description": status.phrase}
    for status in map(HTTPStatus, (400, 401, 403, 404, 409, 413, 422, 429, 503))
}
"""What every route may answer with."""


def code_of(status: int) -> str:
    """The code for a refusal by HTTP's own rules."""
    return _CODES.get(status, "error")


def respond(
    status: int,
    code: str,
    message: str,
    *,
    hint: str | None = None,
    details: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as a response."""
    document = {"code": code, "message": message, "hint": hint, "details": dict(details or {})}
    return JSONResponse(document, status_code=status, headers=dict(headers or {}))


def respond_to(error: ReplicationError) -> JSONResponse:
    """The response for an error of ours."""
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), None)
    headers: dict[str, str] = {}
    if status is None:
        structlog.get_logger().error(str(error.args[0]), code=error.code, hint=error.hint)
        status = HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, LimitError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    elif status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    elif status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return respond(status, error.code, str(error.args[0]), hint=error.hint, headers=headers)


def respond_to_problems(problems: Sequence[Mapping[str, Any]]) -> JSONResponse:
    """The response to a request that is not as the OpenAPI document says. Echoes nothing of it."""
    told = [
        {
            "where": ".".join(str(part) for part in problem["loc"])
            .encode("ascii", "replace")
            .decode(),
            "what": str(problem["msg"]).removeprefix("Value error, "),
        }
        for problem in problems
    ]
    return respond(
        HTTPStatus.UNPROCESSABLE_ENTITY,
        "invalid",
        "; ".join(f"{problem['where']}: {problem['what']}" for problem in told),
        hint="the OpenAPI document says what is expected",
        details={"problems": told},
    )


def answer_errors(app: FastAPI) -> None:
    """Have ``app`` answer all errors in our shape."""

    @app.exception_handler(ReplicationError)
    async def _ours(_: Request, error: ReplicationError) -> JSONResponse:
        return respond_to(error)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return respond_to_problems(error.errors())

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> JSONResponse:
        return respond(
            error.status_code, code_of(error.status_code), error.detail, headers=error.headers
        )

    app.add_middleware(_Unexpected)


class _Unexpected:
    """A defect is logged whole and told as one; the daemon goes on with other requests."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except ReplicationError as error:
            if started:
                raise
            await respond_to(error)(scope, receive, send)
        except Exception:  # the outermost place of a request
            structlog.get_logger().exception(
                "a defect failed a request", method=scope.get("method"), path=scope.get("path")
            )
            if started:
                raise
            response = respond(
                HTTPStatus.INTERNAL_SERVER_ERROR,
                "defect",
                "the config server failed to answer; its log says why",
                hint="tell its maintainers, with the log",
            )
            await response(scope, receive, send)

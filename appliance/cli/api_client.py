"""The config server as the command line speaks to it: HTTPS, JSON, one shape of errors.

Source: docs/CONTROL.md §6.
"""

import ssl
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from appliance.cli.sign_in import SignIn, require_sign_in
from daemon.tls import CONFIG_SERVER_UNIT, demand_unit
from replication.errors import (
    AccessError,
    ConfigError,
    ConflictError,
    InputError,
    LimitError,
    NotFoundError,
    PeerError,
    ReplicationError,
    UnavailableError,
    UnknownCallerError,
)

API_PREFIX = "/api/v1"
TIMEOUT_SECONDS = 30.0
PAGE_ITEMS = 200
PAGES_MAX = 10_000
ATTEMPTS_MAX = 4
RETRY_AFTER_SECONDS_MAX = 5.0

Params = Mapping[str, str | int | bool | None]


_ERRORS: dict[int, type[ReplicationError]] = {
    400: InputError,
    401: UnknownCallerError,
    403: AccessError,
    404: NotFoundError,
    409: ConflictError,
    413: InputError,
    422: InputError,
    429: LimitError,
    503: UnavailableError,
}


class ApiClient:
    """A connection to the config server, as a context."""

    def __init__(self, sign_in: SignIn, *, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._url = sign_in.url.rstrip("/")
        headers = {"Authorization": f"Bearer {sign_in.token}"} if sign_in.token else {}
        self._http = httpx.Client(
            base_url=self._url + API_PREFIX,
            headers=headers,
            verify=tls_context(sign_in.ca_pem),
            timeout=timeout_seconds,
            follow_redirects=False,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def get(self, path: str, params: Params | None = None) -> Any:
        return self._ask("GET", path, params=params)

    def post(self, path: str, body: object = None) -> Any:
        return self._ask("POST", path, body=body)

    def put(self, path: str, body: object) -> Any:
        return self._ask("PUT", path, body=body)

    def get_bytes(self, path: str) -> bytes:
        """What is no JSON: a page, a picture, a text."""
        return self._answer("GET", path).content

    def patch(self, path: str, body: object) -> Any:
        return self._ask("PATCH", path, body=body)

    def delete(self, path: str, params: Params | None = None) -> Any:
        return self._ask("DELETE", path, params=params)

    def items(
        self, path: str, params: Params | None = None, *, count_max: int | None = None
    ) -> list[dict[str, Any]]:
        """A paged list, whole, or the first ``count_max`` of it."""
        found: list[dict[str, Any]] = []
        for page in self._pages(path, params or {}, count_max):
            found += page
            if count_max is not None and len(found) >= count_max:
                return found[:count_max]
        return found

    def _pages(
        self, path: str, params: Params, count_max: int | None
    ) -> Iterator[list[dict[str, Any]]]:
        cursor: str | None = None
        limit = min(PAGE_ITEMS, count_max or PAGE_ITEMS)
        for _ in range(PAGES_MAX):
            page = self.get(path, {**params, "limit": limit, "cursor": cursor})
            try:
                yield page["items"]
                cursor = page["next"]
            except (KeyError, TypeError) as error:
                raise PeerError(
                    f"{self._url} did not answer {path} with a list",
                    hint="are command line and config server of the same version?",
                ) from error
            if cursor is None:
                return

    def _ask(
        self, method: str, path: str, *, params: Params | None = None, body: object = None
    ) -> Any:
        return self._read(self._answer(method, path, params=params, body=body))

    def _answer(
        self, method: str, path: str, *, params: Params | None = None, body: object = None
    ) -> httpx.Response:
        given = {
            key: str(value).lower() if isinstance(value, bool) else value
            for key, value in (params or {}).items()
            if value is not None
        }
        for attempt in range(ATTEMPTS_MAX):
            try:
                answer = self._http.request(method, path, params=given, json=body)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            if answer.is_success:
                return answer
            wait = _retry_after_seconds(answer)
            if wait is None or attempt + 1 == ATTEMPTS_MAX:
                break
            time.sleep(wait)
        raise self._refusal(answer)

    def _read(self, answer: httpx.Response) -> Any:
        if not answer.content:
            return None
        try:
            return answer.json()
        except ValueError as error:
            raise PeerError(
                f"{self._url} answers with something that is not JSON",
                hint="is this the address of a config server?",
            ) from error

    def _refusal(self, answer: httpx.Response) -> ReplicationError:
        try:
            told = answer.json()
            message, hint = str(told["message"]), told.get("hint")
        except (ValueError, KeyError, TypeError, AttributeError):
            return PeerError(
                f"{self._url} answers {answer.status_code} {answer.reason_phrase}",
                hint="is this the address of a config server?",
            )
        kind = _ERRORS.get(answer.status_code, ReplicationError)
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            hint = "sign in again with a good token: `understudy login URL`"
        return kind(message, hint=str(hint) if hint else None)

    def _unreachable(self, error: httpx.HTTPError) -> ReplicationError:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                told = getattr(cause, "verify_message", "") or str(cause)
                return PeerError(
                    f"the certificate of {self._url} cannot be trusted: {told}",
                    hint="sign in with --ca FILE or --fingerprint; on its host, "
                    "`understudy-config-server ca` tells both",
                )
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx.TimeoutException):
            told = "it did not answer in time"
        else:
            told = str(error) or type(error).__name__
        return UnavailableError(
            f"cannot reach the config server {self._url}: {told}",
            hint="is it running, is the address right, is a firewall between?",
        )


def connect() -> ApiClient:
    """To the config server that somebody is signed in to."""
    return ApiClient(require_sign_in())


def part(name: str) -> str:
    """A name as one part of a path."""
    return quote(name, safe="")


def _retry_after_seconds(answer: httpx.Response) -> float | None:
    """How long to wait before asking again; None where that is no use or takes too long."""
    if answer.status_code != HTTPStatus.TOO_MANY_REQUESTS:
        return None
    told = answer.headers.get("retry-after", "")
    return float(told) if told.isdecimal() and float(told) <= RETRY_AFTER_SECONDS_MAX else None


def tls_context(ca_pem: str) -> ssl.SSLContext:
    """Trusts that CA alone, and of its servers the config server alone; without one the system's.

    The process servers have certificates of the same CA, and must not be given a token.
    """
    try:
        context = ssl.create_default_context(cadata=ca_pem or None)
    except ssl.SSLError as error:
        raise ConfigError("the CA is not a PEM certificate", hint="name it with --ca") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if ca_pem:
        demand_unit(context, CONFIG_SERVER_UNIT)
    return context

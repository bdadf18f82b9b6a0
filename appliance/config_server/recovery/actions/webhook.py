"""Webhooks: one POST, judged by its status. The answer's body is not read: it is nobody's business
here, and plans must not be a way to read what this host can reach.

Source: RFC 9110 §9.3.3, §15.
"""

from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx

from replication.errors import UnavailableError


async def post(url: str, headers: Mapping[str, str], body: bytes) -> httpx.Response:
    """The answer without its body. Raises UnavailableError when there is none."""
    try:
        async with (
            httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=None) as client,  # noqa: S113 - whoever calls has a limit for all of it
            client.stream(
                "POST", url, content=body, headers={**headers, "Content-Type": "application/json"}
            ) as answer,
        ):
            return answer
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        # Its text may hold the URL, which some services take for a secret.
        told = type(error).__name__
        raise UnavailableError(f"{urlsplit(url).hostname}: no answer ({told})") from error


def host_of(url: str) -> str:
    """What may be told of a URL."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"

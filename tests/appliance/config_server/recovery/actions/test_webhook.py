"""Webhooks against a real server on loopback."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web

from appliance.config_server.recovery.plans.secrets import seal_headers
from appliance.config_server.recovery.plans.yaml_text import parse_plan
from appliance.config_server.recovery.run import ActionKind
from tests.appliance.config_server.recovery.actions.orders import VAULT, order, runner
from tests.appliance.config_server.recovery.plans.shop import SHOP


class Listening:
    """A server that keeps what it is sent. Paths are the status it answers; 999 never answers."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], Any]] = []
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        self.got.append((request.path, dict(request.headers), body))
        status = int(request.path.strip("/"))
        if status == 999:
            await asyncio.Event().wait()
        return web.Response(status=status, headers={"Location": "/200"}, body=b"x" * 100)


@pytest.fixture
async def listening() -> AsyncIterator[Listening]:
    server = Listening()
    app = web.Application()
    app.router.add_route("*", "/{status}", server.answer)
    running = web.AppRunner(app, shutdown_timeout=0.1)
    await running.setup()
    try:
        site = web.TCPSite(running, "127.0.0.1", 0)
        await site.start()
        server.url = f"http://127.0.0.1:{running.addresses[0][1]}"
        yield server
    finally:
        await running.cleanup()


@pytest.mark.parametrize(
    ("status", "succeeded"), [(200, True), (204, True), (302, False), (404, False), (500, False)]
)
async def test_the_status_decides_and_redirects_are_not_followed(
    tmp_path: Path, listening: Listening, status: int, succeeded: bool
) -> None:
    hook = order(ActionKind.WEBHOOK, {"url": f"{listening.url}/{status}?key=hidden"})
    outcome = await runner(tmp_path).run(hook)
    assert (outcome.succeeded, outcome.exit_code) == (succeeded, status)
    ((path, headers, body),) = listening.got
    assert path == f"/{status}"
    assert headers["Content-Type"] == "application/json"
    assert body["RecoveryPlanName"] == "shop"
    assert "hidden" not in outcome.detail


async def test_headers_are_opened_for_the_server_alone(
    tmp_path: Path, listening: Listening
) -> None:
    text = SHOP.replace("https://monitoring.example.net/hook", f"{listening.url}/500")
    stored = seal_headers(VAULT, parse_plan(text), None).groups[1].after[1].webhook
    assert stored is not None
    with structlog.testing.capture_logs() as logs:
        outcome = await runner(tmp_path).run(
            order(ActionKind.WEBHOOK, stored.model_dump(mode="json"))
        )
    assert listening.got[0][1]["Authorization"] == "Bearer let-me-in"
    assert "let-me-in" not in f"{outcome}{logs}"
    assert [log["event"] for log in logs] == ["action begins", "action ended"]


async def test_one_that_does_not_answer_is_given_up(tmp_path: Path, listening: Listening) -> None:
    hook = order(ActionKind.WEBHOOK, {"url": f"{listening.url}/999"}, seconds_max=1)
    outcome = await runner(tmp_path).run(hook)
    assert not outcome.succeeded
    assert "had not ended after 1 s" in outcome.detail


async def test_one_that_cannot_be_reached_is_told_without_its_secrets(tmp_path: Path) -> None:
    hook = order(ActionKind.WEBHOOK, {"url": "http://127.0.0.1:1/hook?key=hidden"})
    outcome = await runner(tmp_path).run(hook)
    assert not outcome.succeeded
    assert outcome.detail == "127.0.0.1: no answer (ConnectError)"

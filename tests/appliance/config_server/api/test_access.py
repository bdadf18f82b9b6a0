"""Each route with each role, with none, and with tokens and certificates that are no good."""

import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy import select, update

from appliance.config_server.api.access import Access, anyone, needs
from appliance.config_server.api.app import guarded_routes
from appliance.config_server.api.router import PREFIX, Router
from appliance.config_server.audit import REFUSALS_PER_MINUTE_MAX
from appliance.config_server.caller import Caller
from appliance.config_server.store.schema import AuditEntry, Certificate, Token
from replication.control.role import NodeRole, OperatorRole
from tests.appliance.config_server.running import DAY_NS, Rig, open_rig

ANYONE = {
    ("GET", "healthz"),
    ("GET", "openapi.json"),
    ("POST", "enrolment/challenges"),
    ("POST", "enrolment/certificates"),
}
READ_BY_CONTRIBUTORS = {("GET", "tokens"), ("GET", "audit")}
CHANGED_BY_OPERATORS = {
    ("POST", "machines/{}/resync"),
    ("POST", "jobs/{}/cancel"),
    ("POST", "jobs/{}/resume"),
    ("POST", "machines/{}/failovers"),
    ("POST", "failovers/{}/cleanup"),
    ("POST", "failovers/{}/change-point"),
    ("POST", "failovers/{}/commit"),
    ("POST", "failovers/{}/cancel"),
    ("POST", "plans/{}/runs"),
    ("POST", "runs/{}/cleanup"),
    ("POST", "drills"),
}
"""Docs/CONTROL.md §6 beside its rule: Readers get, Contributors change, nodes have ``node/``."""


def _meant(method: str, path: str) -> Access:
    """Who is to be let in, by the design."""
    plain = re.sub(r"{\w+}", "{}", path.removeprefix(f"{PREFIX}/"))
    if (method, plain) in ANYONE:
        return Access()
    if plain == "node/data-keys/{}":
        return Access(nodes=frozenset({NodeRole.MACHINE, NodeRole.APPLIER}))
    if plain == "node/points":
        return Access(nodes=frozenset({NodeRole.APPLIER}))
    if plain == "node/evidence/{}/{}":
        return Access(nodes=frozenset({NodeRole.COMPUTE}))
    if plain.startswith("node/"):
        return Access(nodes=frozenset(NodeRole))
    if (method, plain) in CHANGED_BY_OPERATORS:
        return Access(role=OperatorRole.OPERATOR)
    if method == "GET" and (method, plain) not in READ_BY_CONTRIBUTORS:
        return Access(role=OperatorRole.READER)
    return Access(role=OperatorRole.CONTRIBUTOR)


def _endpoints(rig: Rig) -> Iterator[tuple[str, APIRoute]]:
    for route in guarded_routes(rig.app):
        for method in sorted(route.methods or ()):
            yield method, route


async def _knock(client: httpx.AsyncClient, method: str, route: APIRoute) -> httpx.Response:
    """Ask without saying anything that could be done."""
    path = re.sub(r"{\w+}", str(uuid.uuid4()), route.path)
    return await client.request(
        method, f"https://config-server{path}", params={"wait_seconds": 0}, timeout=30
    )


async def test_every_route_lets_in_whom_it_is_meant_for_and_nobody_else(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        callers = {role: rig.operator(role) for role in OperatorRole}
        nodes = {role: rig.node(await rig.enrol(role)) for role in NodeRole}
        ranks = list(OperatorRole)
        seen = 0
        for method, route in _endpoints(rig):
            meant = _meant(method, route.path)
            for role, client in callers.items():
                allowed = meant.anyone or (
                    meant.role is not None and ranks.index(role) >= ranks.index(meant.role)
                )
                expected = set() if allowed else {401 if meant.nodes else 403}
                _check(await _knock(client, method, route), expected, role)
            for node_role, client in nodes.items():
                allowed = meant.anyone or node_role in meant.nodes
                expected = set() if allowed else {403 if meant.nodes else 401}
                _check(await _knock(client, method, route), expected, node_role)
            seen += 1
        assert seen >= 6


async def test_whoever_is_nobody_gets_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_rig(tmp_path) as rig:
        monkeypatch.setattr("appliance.config_server.api.limits.FREE_FAILURES", 10**6)
        good = rig.tokens[OperatorRole.CONTRIBUTOR]
        revoked = await rig.token(OperatorRole.CONTRIBUTOR, name="gone")
        expired = await rig.token(OperatorRole.CONTRIBUTOR, name="old", days=1)
        machine = await rig.enrol(NodeRole.MACHINE)
        dead = await rig.enrol(NodeRole.MACHINE)
        old = await rig.enrol(NodeRole.MACHINE)
        async with rig.server.database.writing() as session:
            await session.execute(update(Token).where(Token.name == "gone").values(revoked_ns=1))
            await session.execute(update(Token).where(Token.name == "old").values(expires_ns=1))
            await session.execute(
                update(Certificate).where(Certificate.serial == dead.serial).values(revoked_ns=1)
            )
            await session.execute(
                update(Certificate).where(Certificate.serial == old.serial).values(expires_ns=1)
            )
        strangers = {
            "none": rig.client(),
            "a wrong token": rig.client(token="us_" + "x" * 43),
            "a revoked token": rig.client(token=revoked),
            "an expired token": rig.client(token=expired),
            "a token with a letter more": rig.client(token=good + "a"),
            "a token's beginning": rig.client(token=good[:-1]),
            "a token that is too long": rig.client(token="a" * 5000),
            "a revoked certificate": rig.node(dead),
            "an expired certificate": rig.node(old),
            "a certificate that we never issued": rig.node(
                type(machine)(machine.node, machine.role, "abc")
            ),
            "another's certificate": rig.node(
                type(machine)(machine.node, machine.role, dead.serial)
            ),
        }
        for scheme in ("Basic", "", "Bearer Bearer", "bearer\t"):
            strangers[f"scheme {scheme!r}"] = client = rig.client()
            client.headers["authorization"] = f"{scheme} {good}".strip()
        strangers["the scheme alone"] = client = rig.client()
        client.headers["authorization"] = "Bearer"
        for method, route in _endpoints(rig):
            if _meant(method, route.path).anyone:
                continue
            for name, client in strangers.items():
                _check(await _knock(client, method, route), {401}, name)


def _check(response: httpx.Response, expected: set[int], who: object) -> None:
    request = f"{response.request.method} {response.request.url} by {who}"
    assert response.status_code < 500 or response.status_code == 503, (request, response.text)
    refused = {response.status_code} & {401, 403}
    if "may not do this" not in response.text:
        refused -= {403}  # the route itself has looked, and found this very thing not allowed
    assert refused == expected, (request, response.text)
    if refused:
        assert set(response.json()) == {"code", "message", "hint", "details"}, request
        assert response.json()["hint"], request


async def test_the_openapi_document_says_what_each_route_asks_for(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        document = (await rig.client().get("openapi.json")).json()
        assert set(document["components"]["securitySchemes"]) == {"token", "certificate"}
        for method, route in _endpoints(rig):
            if not route.include_in_schema:
                continue
            operation = document["paths"][route.path][method.lower()]
            meant = _meant(method, route.path)
            expected: list[dict[str, list[str]]]
            expected = [{"certificate": []}] if meant.nodes else [{"token": []}]
            assert operation["security"] == ([] if meant.anyone else expected)
            assert operation["responses"]["429"]["content"]["application/json"]["schema"] == {
                "$ref": "#/components/schemas/ErrorDocument"
            }


def test_a_route_that_names_no_role_cannot_be_defined() -> None:
    router = Router("open")
    with pytest.raises(AssertionError, match="who may use it"):

        @router.get("/door")
        async def _door() -> None: ...

    with pytest.raises(AssertionError, match="2 times"):

        @router.get("/two", dependencies=[anyone()])
        async def _two(_: Annotated[Caller, needs(OperatorRole.READER)]) -> None: ...


async def test_who_is_refused_costs_no_body_and_learns_nothing_of_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        told = await rig.client().post("tokens", content=b"{", headers={"content-type": "x/y"})
        assert told.status_code == 401
        assert "body" not in told.text


async def test_refused_changes_are_audited_but_not_without_end(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        reader = rig.operator(OperatorRole.READER)
        for _ in range(REFUSALS_PER_MINUTE_MAX + 5):
            assert (await reader.post("tokens", json={})).status_code == 403
        assert (await reader.get("tokens")).status_code == 403  # reading is not audited
        rig.clock.ahead_ns = 61 * 10**9
        await rig.client().delete("tokens/x")
        async with rig.server.database.reading() as session:
            entries = (await session.scalars(select(AuditEntry).order_by(AuditEntry.id))).all()
        assert len(entries) == REFUSALS_PER_MINUTE_MAX + 1
        first, last = entries[0], entries[-1]
        assert (first.action, first.outcome, first.role) == (
            f"POST {PREFIX}/tokens",
            "forbidden",
            "reader",
        )
        assert first.who.startswith("reader-")
        assert (last.who, last.outcome, last.detail) == (
            "nobody",
            "unauthenticated",
            {"left_out_before": 5},
        )


async def test_wrong_tokens_make_their_source_wait_longer_each_time(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        attacker = rig.client(token="us_wrong", source="203.0.113.5")
        statuses = [(await attacker.get("me")).status_code for _ in range(6)]
        assert statuses == [401, 401, 401, 401, 429, 429]
        slowed = await attacker.get("me")
        assert int(slowed.headers["retry-after"]) >= 1
        right = rig.client(token=rig.tokens[OperatorRole.READER], source="203.0.113.5")
        assert (await right.get("me")).status_code == 429  # else guessing would cost nothing
        elsewhere = rig.client(token=rig.tokens[OperatorRole.READER], source="203.0.113.6")
        assert (await elsewhere.get("me")).status_code == 200
        assert (await rig.client(source="203.0.113.5").get("healthz")).status_code == 200


async def test_a_token_expires_at_its_time(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        client = rig.client(token=await rig.token(OperatorRole.READER, days=1))
        assert (await client.get("me")).status_code == 200
        rig.clock.ahead_ns = DAY_NS
        assert (await client.get("me")).status_code == 401


async def test_a_thousand_nodes_behind_one_address_do_not_starve_each_other(
    tmp_path: Path,
) -> None:
    limits = {"requests_per_second": 0.1, "requests_burst": 3, "node_requests_burst": 5}
    async with open_rig(tmp_path, limits={**limits, "node_requests_per_second": 0.1}) as rig:
        stranger = rig.client()
        assert [(await stranger.get("healthz")).status_code for _ in range(4)] == [200] * 3 + [429]
        for _ in range(20):
            node = rig.node(await rig.enrol(NodeRole.MACHINE))
            assert [(await node.get("healthz")).status_code for _ in range(5)] == [200] * 5
        limited = await node.get("healthz")
        assert (limited.status_code, limited.json()["code"]) == (429, "limit")
        assert int(limited.headers["retry-after"]) >= 1

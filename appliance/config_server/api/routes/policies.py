"""``policies``: what is kept of a machine, how often, and when a resync may begin."""

from dataclasses import asdict
from http import HTTPStatus
from typing import Annotated, Literal

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Count64, Name, NameInPath, Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.protection.policies import (
    change_policy,
    create_policy,
    delete_policy,
    find_policy,
    settings_of,
)
from appliance.config_server.protection.policy import FAILBACK, PolicySettings
from appliance.config_server.store.schema import Policy
from replication.control.role import OperatorRole

router = Router("policies")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Contributor = Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]
Seconds = Annotated[int, Field(ge=0, le=2**31 - 1)]
WindowText = Annotated[str, Field(max_length=16)]
_DEFAULTS = PolicySettings()


class PolicyRequest(BaseModel):
    """A policy to make; what is left out is as Site Recovery has it.

    app_frequency_seconds: 0: no app-consistent points.
    resync_window:         ``HH:MM-HH:MM`` in UTC, or ``always``.
    """

    model_config = ConfigDict(extra="forbid")

    name: Name
    rpo_threshold_seconds: Seconds = _DEFAULTS.rpo_threshold_seconds
    retention_seconds: Seconds = _DEFAULTS.retention_seconds
    crash_frequency_seconds: Seconds = _DEFAULTS.crash_frequency_seconds
    app_frequency_seconds: Seconds = _DEFAULTS.app_frequency_seconds
    resync_window: WindowText = _DEFAULTS.resync_window


class PolicyChange(BaseModel):
    """What to change of a policy. ``revision``: the one that was read, where that matters."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    rpo_threshold_seconds: Seconds | None = None
    retention_seconds: Seconds | None = None
    crash_frequency_seconds: Seconds | None = None
    app_frequency_seconds: Seconds | None = None
    resync_window: WindowText | None = None
    revision: Count64 | None = None


class PolicyDocument(BaseModel):
    """A policy. ``kind`` failback: it was made along with ``name`` less ``-failback``."""

    name: str
    kind: Literal["replication", "failback"]
    rpo_threshold_seconds: int
    retention_seconds: int
    crash_frequency_seconds: int
    app_frequency_seconds: int
    resync_window: str
    created_ns: int
    revision: int


@router.get("")
async def list_policies(server: ServerOf, paging: PagingOf, _: Reader) -> Page[PolicyDocument]:
    """List the policies by name, failback policies as well."""
    async with server.database.reading() as session:
        rows, following = await read_page(session, select(Policy), [Policy.name], paging)
    return Page(items=[_document(row) for row in rows], next=following)


@router.get("/{name}")
async def read_policy(server: ServerOf, name: NameInPath, _: Reader) -> PolicyDocument:
    """One policy."""
    async with server.database.reading() as session:
        return _document(await find_policy(session, name))


@router.post("", status_code=HTTPStatus.CREATED)
async def create(server: ServerOf, caller: Contributor, request: PolicyRequest) -> PolicyDocument:
    """Make a policy, and its failback policy along with it."""
    settings = PolicySettings(**request.model_dump(exclude={"name"}))
    detail = request.model_dump(exclude={"name"})
    async with server.change(caller, "policy.create", request.name, detail) as session:
        policy = await create_policy(
            session,
            request.name,
            settings,
            lab=server.config.policies.allow_short_crash_frequency,
            now_ns=server.clock(),
        )
    return _document(policy)


@router.patch("/{name}")
async def change(
    server: ServerOf, caller: Contributor, name: NameInPath, request: PolicyChange
) -> PolicyDocument:
    """Change a policy; the nodes of the machines that use it follow."""
    detail = request.model_dump(exclude_none=True)
    changes = {key: value for key, value in detail.items() if key not in ("name", "revision")}
    async with server.change(caller, "policy.change", name, detail) as session:
        policy = await change_policy(
            session,
            server.protection.ports,
            name,
            changes,
            lab=server.config.policies.allow_short_crash_frequency,
            new_name=request.name,
            revision=request.revision,
        )
    return _document(policy)


@router.delete("/{name}", status_code=HTTPStatus.NO_CONTENT)
async def delete(server: ServerOf, caller: Contributor, name: NameInPath) -> Response:
    """Delete a policy that no machine uses, and its failback policy."""
    async with server.change(caller, "policy.delete", name) as session:
        await delete_policy(session, name)
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _document(row: Policy) -> PolicyDocument:
    return PolicyDocument(
        name=row.name,
        kind="failback" if row.kind == FAILBACK else "replication",
        created_ns=row.created_ns,
        revision=row.revision,
        **asdict(settings_of(row)),
    )

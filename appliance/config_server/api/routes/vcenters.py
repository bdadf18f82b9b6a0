"""``vcenters``: where virtual machines are discovered. Passwords go in and never out."""

import uuid
from http import HTTPStatus
from typing import Annotated

from fastapi import Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints
from sqlalchemy import func, select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Count64, Name, NameInPath, Router, ServerOf
from appliance.config_server.caller import Caller
from appliance.config_server.discovery.entries import (
    add_vcenter,
    change_vcenter,
    find_vcenter,
    remove_vcenter,
)
from appliance.config_server.discovery.record import VCenterState
from appliance.config_server.discovery.target import URL_CHARS_MAX, Verify
from appliance.config_server.store.schema import VCenter, VirtualMachine
from replication.control.role import OperatorRole

router = Router("vcenters")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Contributor = Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]
PEM_CHARS_MAX = 64 << 10
_PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
Url = Annotated[str, StringConstraints(max_length=URL_CHARS_MAX, pattern=_PRINTABLE)]
User = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=_PRINTABLE)]
Password = Annotated[SecretStr, Field(min_length=1, max_length=1024)]
Pem = Annotated[str, StringConstraints(max_length=PEM_CHARS_MAX, pattern=r"^[^\x00]*$")]


class VCenterRequest(BaseModel):
    """A vCenter to discover.

    url:    ``https://host[:port]``.
    verify: how its certificate is checked: ``ca``: against ``ca_pem``, or what the system trusts
            where that is empty; ``pinned``: it is the one in ``ca_pem``; ``none``: not at all.
    """

    model_config = ConfigDict(extra="forbid")

    name: Name
    url: Url
    username: User
    password: Password
    verify: Verify = Verify.CA
    ca_pem: Pem = ""


class VCenterChange(BaseModel):
    """What to change of a vCenter. ``revision``: the one that was read, where that matters."""

    model_config = ConfigDict(extra="forbid")

    name: Name | None = None
    url: Url | None = None
    username: User | None = None
    password: Password | None = None
    verify: Verify | None = None
    ca_pem: Pem | None = None
    revision: Count64 | None = None


class VCenterDocument(BaseModel):
    """A vCenter.

    state:    ``refused``: the credentials are wrong; nothing is tried until they are changed.
    seen_ns:  when it last answered.
    vm_count: VMs that are known; of a vCenter that is not connected, as they were.
    """

    id: uuid.UUID
    name: str
    url: str
    username: str
    verify: Verify
    ca_pem: str
    instance_uuid: str
    state: VCenterState
    reason: str
    added_ns: int
    seen_ns: int
    vm_count: int
    revision: int


@router.get("")
async def list_vcenters(server: ServerOf, paging: PagingOf, _: Reader) -> Page[VCenterDocument]:
    """List the vCenters by name."""
    async with server.database.reading() as session:
        rows, following = await read_page(session, select(VCenter), [VCenter.name], paging)
        counted = await session.execute(
            select(VirtualMachine.vcenter_id, func.count())
            .where(
                VirtualMachine.vcenter_id.in_([row.id for row in rows]),
                VirtualMachine.removed_ns.is_(None),
            )
            .group_by(VirtualMachine.vcenter_id)
        )
        counts = {row[0]: row[1] for row in counted}
    return Page(items=[_document(row, counts.get(row.id, 0)) for row in rows], next=following)


@router.get("/{vcenter}")
async def read_vcenter(server: ServerOf, vcenter: NameInPath, _: Reader) -> VCenterDocument:
    """One vCenter, by name or id."""
    async with server.database.reading() as session:
        row = await find_vcenter(session, vcenter)
        count = await session.scalar(
            select(func.count()).where(
                VirtualMachine.vcenter_id == row.id, VirtualMachine.removed_ns.is_(None)
            )
        )
    return _document(row, count or 0)


@router.post("", status_code=HTTPStatus.CREATED)
async def add(server: ServerOf, caller: Contributor, request: VCenterRequest) -> VCenterDocument:
    """Add a vCenter; its inventory is read at once, and followed from then on."""
    told = request.model_dump(mode="json", include={"url", "username", "verify"})
    async with server.change(caller, "vcenter.add", request.name, told) as session:
        row = await add_vcenter(
            session,
            server.identity.vault,
            name=request.name,
            url=request.url,
            username=request.username,
            password=request.password.get_secret_value(),
            verify=request.verify,
            ca_pem=request.ca_pem,
            now_ns=server.clock(),
        )
    server.discovery.wake()
    return _document(row, 0)


@router.patch("/{vcenter}")
async def change(
    server: ServerOf, caller: Contributor, vcenter: NameInPath, request: VCenterChange
) -> VCenterDocument:
    """Change a vCenter; it is read anew, also when it has refused before."""
    changes = request.model_dump(exclude_none=True, exclude={"revision", "password"})
    told = {
        **request.model_dump(mode="json", exclude_none=True, exclude={"password", "ca_pem"}),
        "password_changed": request.password is not None,
        "ca_changed": request.ca_pem is not None,
    }
    if request.password is not None:
        changes["password"] = request.password.get_secret_value()
    async with server.change(caller, "vcenter.change", vcenter, told) as session:
        row = await change_vcenter(
            session, server.identity.vault, vcenter, changes, revision=request.revision
        )
        count = await session.scalar(
            select(func.count()).where(
                VirtualMachine.vcenter_id == row.id, VirtualMachine.removed_ns.is_(None)
            )
        )
    server.discovery.wake()
    return _document(row, count or 0)


@router.delete("/{vcenter}", status_code=HTTPStatus.NO_CONTENT)
async def remove(server: ServerOf, caller: Contributor, vcenter: NameInPath) -> Response:
    """Remove a vCenter and its inventory; machines that are protected stay so."""
    async with server.change(caller, "vcenter.remove", vcenter) as session:
        await remove_vcenter(session, vcenter)
    server.discovery.wake()
    return Response(status_code=HTTPStatus.NO_CONTENT)


def _document(row: VCenter, vm_count: int) -> VCenterDocument:
    return VCenterDocument(
        id=row.id,
        name=row.name,
        url=row.url,
        username=row.username,
        verify=Verify(row.verify),
        ca_pem=row.ca_pem,
        instance_uuid=row.instance_uuid,
        state=VCenterState(row.state),
        reason=row.reason,
        added_ns=row.added_ns,
        seen_ns=row.seen_ns,
        vm_count=vm_count,
        revision=row.revision,
    )

"""Entries of vCenters as people make, change and remove them."""

import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from sqlalchemy import delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.discovery.record import VCenterState
from appliance.config_server.discovery.service import PASSWORD_TABLE
from appliance.config_server.discovery.target import Verify, parse_url, tls_context
from appliance.config_server.store.schema import Machine, VCenter, VirtualMachine
from replication.errors import ConflictError, InputError, NotFoundError


class Sealer(Protocol):
    """What seals passwords. ``identity.vault_key.VaultKey`` is one."""

    def seal(self, secret: bytes, table: str, row: uuid.UUID | str) -> bytes: ...


async def find_vcenter(session: AsyncSession, reference: str) -> VCenter:
    """By id, or by name if no id fits. Raises NotFoundError."""
    try:
        by_id: uuid.UUID | None = uuid.UUID(reference)
    except ValueError:
        by_id = None
    found = await session.get(VCenter, by_id) if by_id is not None else None
    if found is None:
        found = await session.scalar(select(VCenter).where(VCenter.name == reference))
    if found is None:
        raise NotFoundError(
            f"there is no vCenter {reference}", hint="see `understudy vcenters list`"
        )
    return found


async def add_vcenter(
    session: AsyncSession,
    vault: Sealer,
    *,
    name: str,
    url: str,
    username: str,
    password: str,
    verify: Verify,
    ca_pem: str,
    now_ns: int,
) -> VCenter:
    """Raises InputError for an address or a certificate that is none, ConflictError for a name
    that is taken.
    """
    _check(url, verify, ca_pem)
    await _refuse_taken_name(session, name)
    row = VCenter(
        id=uuid.uuid4(),
        name=name,
        url=url,
        username=username,
        password=b"",
        verify=verify,
        ca_pem=ca_pem,
        added_ns=now_ns,
        state=VCenterState.CONNECTING,
        revision=1,
        instance_uuid="",
        reason="",
        seen_ns=0,
    )
    row.password = vault.seal(password.encode(), PASSWORD_TABLE, row.id)
    session.add(row)
    await session.flush()
    return row


async def change_vcenter(
    session: AsyncSession,
    vault: Sealer,
    reference: str,
    changes: Mapping[str, Any],
    *,
    revision: int | None,
) -> VCenter:
    """Change an entry; its reader begins anew, also after a refusal.

    Raises ConflictError when ``revision`` is not the one that is there, InputError when the
    password that is kept would go to whom it was not given for: whoever changes where it goes, or
    by what the other side is known, says it again.
    """
    row = await find_vcenter(session, reference)
    if revision is not None and revision != row.revision:
        raise ConflictError(
            f"the vCenter {row.name} has been changed meanwhile: revision {row.revision}",
            hint="read it again and decide anew",
        )
    new = dict(changes)
    if new.get("name", row.name) != row.name:
        await _refuse_taken_name(session, new["name"])
    if "password" not in new:
        _refuse_to_send_elsewhere(row, new)
    if new.get("url", row.url) != row.url:
        new["instance_uuid"] = ""  # another one may be meant
    if "password" in new:
        new["password"] = vault.seal(new["password"].encode(), PASSWORD_TABLE, row.id)
    for column, value in new.items():
        setattr(row, column, value)
    _check(row.url, Verify(row.verify), row.ca_pem)
    row.revision += 1
    row.state, row.reason = VCenterState.CONNECTING, ""
    await session.flush()
    return row


async def remove_vcenter(session: AsyncSession, reference: str) -> None:
    """Remove an entry and its inventory. Machines that are protected stay so."""
    row = await find_vcenter(session, reference)
    vms = select(VirtualMachine.id).where(VirtualMachine.vcenter_id == row.id)
    await session.execute(update(Machine).where(Machine.vm_id.in_(vms)).values(vm_id=None))
    await session.execute(delete(VirtualMachine).where(VirtualMachine.vcenter_id == row.id))
    await session.delete(row)


_STRICTNESS = (Verify.NONE, Verify.CA, Verify.PINNED)


def _refuse_to_send_elsewhere(row: VCenter, new: Mapping[str, Any]) -> None:
    strictness = _STRICTNESS.index(Verify(new.get("verify", row.verify)))
    changed = [
        name
        for name, differs in (
            ("url", new.get("url", row.url) != row.url),
            ("verify", strictness < _STRICTNESS.index(Verify(row.verify))),
            ("ca_pem", new.get("ca_pem", row.ca_pem) != row.ca_pem),
        )
        if differs
    ]
    if changed:
        raise InputError(
            f"password: it is needed to change {' and '.join(changed)} of the vCenter {row.name}",
            hint="give the password in the same request: it would be sent to another host, or "
            "under a weaker or another check",
        )


def _check(url: str, verify: Verify, ca_pem: str) -> None:
    parse_url(url)
    tls_context(verify, ca_pem)


async def _refuse_taken_name(session: AsyncSession, name: str) -> None:
    if await session.scalar(select(VCenter.id).where(VCenter.name == name)) is not None:
        raise ConflictError(f"there is a vCenter {name} already", hint="choose another name")

"""Policies in the database: made, changed while in use, renamed and deleted with their failback's.

Source: docs/CONTROL.md §8.
"""

import uuid
from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.protection.policy import (
    FAILBACK,
    REPLICATION,
    PolicySettings,
    changed,
    check_name,
    check_settings,
    failback_name,
)
from appliance.config_server.protection.workflow import Ports
from appliance.config_server.store.schema import Machine, Policy
from replication.errors import ConflictError, InputError, NotFoundError

NAMES_TOLD_MAX = 5


async def find_policy(session: AsyncSession, name: str, *, lock: bool = False) -> Policy:
    """Raises NotFoundError."""
    query = select(Policy).where(Policy.name == name)
    policy = await session.scalar(query.with_for_update() if lock else query)
    if policy is None:
        raise NotFoundError(f"there is no policy {name}", hint="`understudy policies` lists them")
    return policy


async def create_policy(
    session: AsyncSession, name: str, settings: PolicySettings, *, lab: bool, now_ns: int
) -> Policy:
    """Make a policy and its failback policy. Raises InputError, ConflictError for a name in use."""
    check_name(name)
    check_settings(settings, allow_short_crash_frequency=lab)
    await _refuse_names(session, (name, failback_name(name)))
    policy = Policy(
        id=uuid.uuid4(), name=name, kind=REPLICATION, created_ns=now_ns, **asdict(settings)
    )
    session.add(policy)
    await session.flush()
    session.add(
        Policy(
            id=uuid.uuid4(),
            name=failback_name(name),
            kind=FAILBACK,
            failback_of=policy.id,
            created_ns=now_ns,
            **asdict(settings),
        )
    )
    await session.flush()
    return policy


async def change_policy(
    session: AsyncSession,
    ports: Ports,
    name: str,
    changes: dict[str, int | str],
    *,
    lab: bool,
    new_name: str | None = None,
    revision: int | None = None,
) -> Policy:
    """Change some of its settings or its name; the nodes of its machines are told.

    revision: the one that was read; another one means that somebody else was quicker.
    """
    policy = await find_policy(session, name, lock=True)
    _refuse_failback(policy)
    if revision is not None and revision != policy.revision:
        raise ConflictError(
            f"policy {name} was changed meanwhile: it has revision {policy.revision}, "
            f"not {revision}",
            hint="read it again and decide anew",
        )
    settings = changed(settings_of(policy), changes)
    check_settings(settings, allow_short_crash_frequency=lab)
    failback = await session.scalar(select(Policy).where(Policy.failback_of == policy.id))
    if new_name is not None and new_name != name:
        check_name(new_name)
        await _refuse_names(session, (new_name, failback_name(new_name)))
        policy.name = new_name
        if failback is not None:
            failback.name = failback_name(new_name)
    for row in (policy, failback):
        if row is not None:
            for key, value in asdict(settings).items():
                setattr(row, key, value)
            row.revision += 1
    await session.flush()
    await tell_users(session, ports, [policy.id])
    return policy


async def delete_policy(session: AsyncSession, name: str) -> None:
    """Raises ConflictError that names machines which use it."""
    policy = await find_policy(session, name, lock=True)
    _refuse_failback(policy)
    users = (
        await session.scalars(
            select(Machine.name)
            .where(Machine.policy_id == policy.id)
            .order_by(Machine.name)
            .limit(NAMES_TOLD_MAX + 1)
        )
    ).all()
    if users:
        more = ", …" if len(users) > NAMES_TOLD_MAX else ""
        raise ConflictError(
            f"policy {name} is in use by {', '.join(users[:NAMES_TOLD_MAX])}{more}",
            hint="unprotect these machines first, or protect them with another policy",
        )
    failback = await session.scalar(select(Policy).where(Policy.failback_of == policy.id))
    if failback is not None:
        await session.delete(failback)
        await session.flush()
    await session.delete(policy)
    await session.flush()


async def tell_users(session: AsyncSession, ports: Ports, policies: Sequence[uuid.UUID]) -> None:
    """Have the agents and appliers of the policies' machines look at their assignments."""
    rows = await session.execute(
        select(Machine.id, Machine.applier_id).where(Machine.policy_id.in_(policies))
    )
    nodes = {node for row in rows for node in row if node is not None}
    await ports.bump(session, sorted(nodes))


def settings_of(policy: Policy) -> PolicySettings:
    return PolicySettings(
        rpo_threshold_seconds=policy.rpo_threshold_seconds,
        retention_seconds=policy.retention_seconds,
        crash_frequency_seconds=policy.crash_frequency_seconds,
        app_frequency_seconds=policy.app_frequency_seconds,
        resync_window=policy.resync_window,
    )


def _refuse_failback(policy: Policy) -> None:
    if policy.kind == FAILBACK:
        raise InputError(
            f"{policy.name} is a failback policy and follows the policy that it was made with",
            hint="change or delete that one",
        )


async def _refuse_names(session: AsyncSession, names: Sequence[str]) -> None:
    taken = await session.scalar(select(Policy.name).where(Policy.name.in_(names)).limit(1))
    if taken is not None:
        raise ConflictError(f"there is a policy {taken} already", hint="choose another name")

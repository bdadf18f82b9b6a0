"""The tables. Times are nanoseconds since 1970 in UTC; JSON columns hold documents that pydantic
models read and write.

Source: docs/CONTROL.md §2.
"""

import uuid
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NAME = 255
_CODE = 64

_COUNTER = BigInteger().with_variant(Integer(), "sqlite")
"""SQLite counts rows up by itself in plain INTEGER columns alone."""


class Base(DeclarativeBase):
    """All tables."""

    type_annotation_map = {int: BigInteger, dict[str, Any]: JSON, list[Any]: JSON}  # noqa: RUF012


class Setting(Base):
    """A value of which there is one, as the salt of the passphrase."""

    __tablename__ = "settings"
    key: Mapped[str] = mapped_column(String(_CODE), primary_key=True)
    value: Mapped[dict[str, Any]]


class Instance(Base):
    """A config server that shares this database; ``seen_ns`` is its heartbeat."""

    __tablename__ = "instances"
    id: Mapped[str] = mapped_column(String(_CODE), primary_key=True)
    host: Mapped[str] = mapped_column(String(_NAME))
    seen_ns: Mapped[int]


class Node(Base):
    """An enrolled daemon, what is wanted of it, and its newest report.

    new_key_until_ns: until then it may enrol with a new key, once; 0: it may not.
    """

    __tablename__ = "nodes"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    role: Mapped[str] = mapped_column(String(_CODE), index=True)
    name: Mapped[str] = mapped_column(String(_NAME))
    bios_uuid: Mapped[uuid.UUID | None] = mapped_column(index=True)
    enrolled_ns: Mapped[int]
    assignment_version: Mapped[int] = mapped_column(default=1)
    seen_ns: Mapped[int] = mapped_column(default=0)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    new_key_until_ns: Mapped[int] = mapped_column(default=0, server_default="0")


class Certificate(Base):
    """A certificate that our CA has issued. ``serial`` in hexadecimal.

    names: DNS names and addresses of a process server.
    """

    __tablename__ = "certificates"
    serial: Mapped[str] = mapped_column(String(_CODE), primary_key=True)
    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"), index=True)
    key_digest: Mapped[str] = mapped_column(String(_CODE))
    issued_ns: Mapped[int]
    expires_ns: Mapped[int]
    revoked_ns: Mapped[int | None]
    revoked_by: Mapped[str | None] = mapped_column(String(_NAME))
    names: Mapped[list[Any]] = mapped_column(default=list, server_default="[]")


class Challenge(Base):
    """A challenge that nobody has answered yet."""

    __tablename__ = "challenges"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    client_nonce: Mapped[bytes] = mapped_column(LargeBinary)
    server_nonce: Mapped[bytes] = mapped_column(LargeBinary)
    expires_ns: Mapped[int] = mapped_column(index=True)


class DataKey(Base):
    """A machine's data key, wrapped by the vault key."""

    __tablename__ = "data_keys"
    machine_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    wrapped: Mapped[bytes] = mapped_column(LargeBinary)
    created_ns: Mapped[int]


class Token(Base):
    """A token of an operator; ``digest`` is SHA-256 of it, in hexadecimal."""

    __tablename__ = "tokens"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME), unique=True)
    role: Mapped[str] = mapped_column(String(_CODE))
    digest: Mapped[str] = mapped_column(String(_CODE), unique=True)
    created_ns: Mapped[int]
    created_by: Mapped[str] = mapped_column(String(_NAME), default="", server_default="")
    expires_ns: Mapped[int]
    revoked_ns: Mapped[int | None]


class AuditEntry(Base):
    """A change: who asked for it, when, from where, and what came of it."""

    __tablename__ = "audit_log"
    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True)
    at_ns: Mapped[int] = mapped_column(index=True)
    who: Mapped[str] = mapped_column(String(_NAME))
    role: Mapped[str] = mapped_column(String(_CODE))
    source: Mapped[str] = mapped_column(String(_NAME))
    action: Mapped[str] = mapped_column(String(_NAME))
    target: Mapped[str] = mapped_column(String(_NAME))
    outcome: Mapped[str] = mapped_column(String(_CODE))
    detail: Mapped[dict[str, Any]]


class VCenter(Base):
    """A vCenter to discover. The password is sealed by the vault key.

    verify:   how its certificate is checked: against ``ca_pem`` as ``ca`` or as the very
              certificate (``pinned``); ``none``: not at all, as the operator said.
    reader:   the instance that reads it, until ``reader_until_ns`` or longer if it renews that.
    revision: counts changes by people; whoever read with an older one stops.
    """

    __tablename__ = "vcenters"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME), unique=True)
    url: Mapped[str] = mapped_column(String(_NAME))
    username: Mapped[str] = mapped_column(String(_NAME))
    password: Mapped[bytes] = mapped_column(LargeBinary)
    ca_pem: Mapped[str] = mapped_column(Text)
    verify: Mapped[str] = mapped_column(String(_CODE), default="ca")
    instance_uuid: Mapped[str] = mapped_column(String(_NAME), default="")
    added_ns: Mapped[int]
    state: Mapped[str] = mapped_column(String(_CODE))
    reason: Mapped[str] = mapped_column(Text, default="")
    seen_ns: Mapped[int] = mapped_column(default=0)
    reader: Mapped[str] = mapped_column(String(_CODE), default="")
    reader_until_ns: Mapped[int] = mapped_column(default=0)
    revision: Mapped[int] = mapped_column(default=1)


class VirtualMachine(Base):
    """A VM as a vCenter shows it. ``stale``: the vCenter cannot be asked just now."""

    __tablename__ = "virtual_machines"
    __table_args__ = (UniqueConstraint("vcenter_id", "moid"),)
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    vcenter_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("vcenters.id"), index=True)
    moid: Mapped[str] = mapped_column(String(_CODE))
    name: Mapped[str] = mapped_column(String(_NAME), index=True)
    folder: Mapped[str] = mapped_column(Text, default="")
    host: Mapped[str] = mapped_column(String(_NAME), default="")
    bios_uuid: Mapped[uuid.UUID | None] = mapped_column(index=True)
    power: Mapped[str] = mapped_column(String(_CODE))
    guest_system: Mapped[str] = mapped_column(String(_NAME), default="")
    hostname: Mapped[str] = mapped_column(String(_NAME), default="")
    addresses: Mapped[list[Any]]
    tools: Mapped[str] = mapped_column(String(_CODE), default="")
    disks: Mapped[list[Any]]
    stale: Mapped[bool] = mapped_column(default=False)
    removed_ns: Mapped[int | None]
    updated_ns: Mapped[int]


class Policy(Base):
    """A replication policy, or the failback policy that was made along with one."""

    __tablename__ = "policies"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME), unique=True)
    kind: Mapped[str] = mapped_column(String(_CODE))
    failback_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("policies.id"))
    rpo_threshold_seconds: Mapped[int]
    retention_seconds: Mapped[int]
    crash_frequency_seconds: Mapped[int]
    app_frequency_seconds: Mapped[int]
    resync_window: Mapped[str] = mapped_column(String(_CODE))
    created_ns: Mapped[int]
    revision: Mapped[int] = mapped_column(default=1)


class Machine(Base):
    """A machine that is, was or is to be protected; its id is its node's and its stream's.

    state:    of the table in protection/table.py.
    revision: counts changes; who writes says which one it saw.
    job_id:   the job that is at work on it, none when there is none.
    points:   ``kept`` as long as its applier has or may have points of it, ``removing`` when the
              applier is told to delete them (`removed`), empty when there are none.
    resync_in_window: a resync that the config server orders by itself when the window opens.
    final_order: counts the orders for a final changeset. final_wanted: the newest of them stands.
    """

    __tablename__ = "machines"
    id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME), unique=True)
    vm_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("virtual_machines.id"))
    policy_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("policies.id"))
    process_server_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("nodes.id"))
    applier_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("nodes.id"))
    state: Mapped[str] = mapped_column(String(_CODE), index=True)
    since_ns: Mapped[int]
    cause: Mapped[str] = mapped_column(String(_CODE), default="")
    reason: Mapped[str] = mapped_column(Text, default="")
    job_id: Mapped[str | None] = mapped_column(String(_CODE))
    points: Mapped[str] = mapped_column(String(_CODE), default="")
    resync_request: Mapped[int] = mapped_column(default=0)
    resync_in_window: Mapped[bool] = mapped_column(default=False)
    final_order: Mapped[int] = mapped_column(default=0, server_default="0")
    final_wanted: Mapped[bool] = mapped_column(default=False, server_default=false())
    revision: Mapped[int] = mapped_column(default=1)


class ProtectedDisk(Base):
    """A disk of a protected machine. A number once used is never given to another disk."""

    __tablename__ = "protected_disks"
    machine_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("machines.id"), primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True)
    device_id: Mapped[str] = mapped_column(String(_NAME))
    device: Mapped[str] = mapped_column(String(_NAME))
    name: Mapped[str] = mapped_column(String(_NAME))
    size_bytes: Mapped[int]
    excluded: Mapped[bool] = mapped_column(default=False)


class Job(Base):
    """A durable workflow as people see it; ``id`` is the workflow's.

    request:  what was asked for, as its kind needs it.
    instance: the config server that works on it, for people to see.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = mapped_column(String(_CODE), primary_key=True)
    kind: Mapped[str] = mapped_column(String(_CODE), index=True)
    target_id: Mapped[uuid.UUID | None] = mapped_column(index=True)
    target: Mapped[str] = mapped_column(String(_NAME))
    state: Mapped[str] = mapped_column(String(_CODE), index=True)
    request: Mapped[dict[str, Any]]
    instance: Mapped[str] = mapped_column(String(_CODE), default="")
    cancel_asked: Mapped[bool] = mapped_column(default=False)
    steps: Mapped[list[Any]]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    asked_by: Mapped[str] = mapped_column(String(_NAME))
    created_ns: Mapped[int] = mapped_column(index=True)
    updated_ns: Mapped[int]
    ended_ns: Mapped[int | None]


class Event(Base):
    """Something that a person should know: open until ``cleared_ns``."""

    __tablename__ = "events"
    id: Mapped[int] = mapped_column(_COUNTER, primary_key=True)
    at_ns: Mapped[int] = mapped_column(index=True)
    code: Mapped[str] = mapped_column(String(_CODE), index=True)
    severity: Mapped[str] = mapped_column(String(_CODE))
    source_id: Mapped[uuid.UUID | None] = mapped_column(index=True)
    source: Mapped[str] = mapped_column(String(_NAME))
    message: Mapped[str] = mapped_column(Text)
    cause: Mapped[str] = mapped_column(Text, default="")
    action: Mapped[str] = mapped_column(Text, default="")
    cleared_ns: Mapped[int | None]
    mailed_ns: Mapped[int | None]

"""The tables of recovery: runs and failovers, what they hold and start, plans, drills, evidence.

A wish is a row, and what a node answers to it is copied into that row: so assignments are functions
of rows, and a config server that starts again, or a second one on the same database, knows all that
the first one knew. ``job_id`` of a row names the job that is at work on it, none when there is
none; nobody else changes it meanwhile.

Source: docs/RECOVERY.md §2, §4 to §6.
"""

import uuid
from typing import Any

from sqlalchemy import JSON, ForeignKey, LargeBinary, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from appliance.config_server.store.schema import Base

_NAME = 255
_CODE = 64
_CHOICE = 255


class Plan(Base):
    """A recovery plan as a document. Runs keep a copy of their own: a plan may change or go."""

    __tablename__ = "plans"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME), unique=True)
    document: Mapped[dict[str, Any]]
    created_by: Mapped[str] = mapped_column(String(_NAME))
    created_ns: Mapped[int]
    updated_ns: Mapped[int]
    revision: Mapped[int] = mapped_column(default=1)


class DrillSchedule(Base):
    """When a drill is to be held, and of what: a plan by its name, or a machine.

    document: the schedule and the options of its failovers.
    next_ns:  when it is due; who holds the drill moves it on in the transaction that begins it.
    """

    __tablename__ = "drill_schedules"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(_NAME), unique=True)
    plan: Mapped[str] = mapped_column(String(_NAME), default="", index=True)
    machine_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("machines.id"))
    document: Mapped[dict[str, Any]]
    next_ns: Mapped[int] = mapped_column(index=True)
    last_ns: Mapped[int] = mapped_column(default=0)
    created_by: Mapped[str] = mapped_column(String(_NAME))
    created_ns: Mapped[int]
    revision: Mapped[int] = mapped_column(default=1)


class DrillReport(Base):
    """A drill and what came of it; refers to nothing that may go before it.

    target:   the plan or the machine, as it was called.
    document: the report; empty while the drill is under way.
    page:     the same for people, a page of HTML that needs nothing else.
    """

    __tablename__ = "drill_reports"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    schedule: Mapped[str] = mapped_column(String(_NAME), default="", index=True)
    target: Mapped[str] = mapped_column(String(_NAME))
    state: Mapped[str] = mapped_column(String(_CODE), index=True)
    asked_by: Mapped[str] = mapped_column(String(_NAME))
    began_ns: Mapped[int] = mapped_column(index=True)
    ended_ns: Mapped[int | None]
    document: Mapped[dict[str, Any]] = mapped_column(default=dict)
    page: Mapped[str] = mapped_column(Text, default="")


class PlanRun(Base):
    """A run of a plan, or of one machine as a plan of one group; one job does it.

    kind:     of `FailoverKind`.
    plan:     its name, empty for a machine alone.
    document: the plan as it was when it was asked for (`recovery.run.RunPlan`).
    notes:    what people wrote, as when it was cleaned up.
    drill_id: the drill that it is part of.
    """

    __tablename__ = "plan_runs"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    plan: Mapped[str] = mapped_column(String(_NAME), index=True)
    kind: Mapped[str] = mapped_column(String(_CODE))
    document: Mapped[dict[str, Any]]
    job_id: Mapped[str] = mapped_column(String(_CODE), index=True)
    asked_by: Mapped[str] = mapped_column(String(_NAME))
    asked_ns: Mapped[int] = mapped_column(index=True)
    ended_ns: Mapped[int | None]
    notes: Mapped[str] = mapped_column(Text, default="")
    drill_id: Mapped[uuid.UUID | None] = mapped_column(index=True)


class Failover(Base):
    """One machine's part of a run.

    machine:  its name.
    group:    counts from 0.
    state:    of `FailoverState`.
    choice:   the point as it was asked for; which one it became is in its hold, and here.
    options:  `recovery.run.FailoverOptions`.
    vm_id:    its virtual machine; another one after a change of the point. next_vm_id: that one,
              while the change is under way.
    asked_source_ns: when it was asked for, by the source's clock as far as it is known.
    final:    the order for the final changeset, 0: none was given. final_ns: when it was.
    final_generation, final_number: that changeset.
    power_off_ns: when its vCenter was last going to be told to switch the source off; 0: never.
    powered_off_ns: when the source was off.
    up_ns:    when the checks were passed, by our clock; 0: not yet.
    error:    why it failed, in the shape of the API's errors.
    """

    __tablename__ = "failovers"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("plan_runs.id"), index=True)
    machine_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("machines.id"), index=True)
    machine: Mapped[str] = mapped_column(String(_NAME))
    group: Mapped[int] = mapped_column(default=0)
    kind: Mapped[str] = mapped_column(String(_CODE), index=True)
    state: Mapped[str] = mapped_column(String(_CODE), index=True)
    job_id: Mapped[str | None] = mapped_column(String(_CODE), index=True)
    choice: Mapped[str] = mapped_column(String(_CHOICE))
    options: Mapped[dict[str, Any]]
    compute_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"))
    network: Mapped[str] = mapped_column(String(_NAME))
    vm_id: Mapped[uuid.UUID | None] = mapped_column(index=True)
    next_vm_id: Mapped[uuid.UUID | None]
    point: Mapped[str] = mapped_column(String(_CHOICE), default="")
    point_ns: Mapped[int] = mapped_column(default=0)
    consistency: Mapped[str] = mapped_column(String(_CODE), default="")
    asked_ns: Mapped[int] = mapped_column(index=True)
    asked_source_ns: Mapped[int] = mapped_column(default=0)
    final: Mapped[int] = mapped_column(default=0)
    final_ns: Mapped[int] = mapped_column(default=0)
    final_generation: Mapped[int] = mapped_column(default=0)
    final_number: Mapped[int] = mapped_column(default=0)
    power_off_ns: Mapped[int] = mapped_column(default=0)
    powered_off_ns: Mapped[int] = mapped_column(default=0)
    up_ns: Mapped[int] = mapped_column(default=0)
    ended_ns: Mapped[int | None]
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    notes: Mapped[str] = mapped_column(Text, default="")
    revision: Mapped[int] = mapped_column(default=1)


class PointHold(Base):
    """A hold (docs/RECOVERY.md §2): in its applier's assignment until ``ended_ns``.

    failover_id: what it is for; none: a lock that somebody asked for, until ``until_ns``.
    answer:      what the applier made of it (`HeldPoint`), copied when it is held or refused.
    """

    __tablename__ = "holds"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    machine_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("machines.id"), index=True)
    applier_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"), index=True)
    failover_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("failovers.id"), index=True)
    choice: Mapped[str] = mapped_column(String(_CHOICE))
    generation: Mapped[int] = mapped_column(default=0)
    number: Mapped[int] = mapped_column(default=0)
    until_ns: Mapped[int] = mapped_column(default=0)
    answer: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    asked_by: Mapped[str] = mapped_column(String(_NAME))
    created_ns: Mapped[int]
    ended_ns: Mapped[int | None] = mapped_column(index=True)


class RecoveredVm(Base):
    """A virtual machine at the second site: in its compute node's assignment until ``gone_ns``.

    wanted:      ``disks``, ``on``, ``off`` (`VmPower`), or ``removed``.
    document:    the rest of its order (`VirtualMachineOrder`), written once.
    independent: its disks are to stand alone. is_independent: they do, it needs no hold any more.
    report:      the newest that the compute node said of it (`VmReport`) when that mattered.
    """

    __tablename__ = "recovered_vms"
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    failover_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("failovers.id"), index=True)
    machine_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("machines.id"), index=True)
    hold_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("holds.id"), index=True)
    compute_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"), index=True)
    wanted: Mapped[str] = mapped_column(String(_CODE))
    document: Mapped[dict[str, Any]]
    independent: Mapped[bool] = mapped_column(default=False)
    is_independent: Mapped[bool] = mapped_column(default=False)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    created_ns: Mapped[int]
    gone_ns: Mapped[int | None] = mapped_column(index=True)


class PlanAction(Base):
    """An action of a run: made when its turn comes.

    group, place, index: where it is in the run's document: ``before`` or ``after`` a group.
    attempt: counts from 1; written down before the action begins, so one that is above 1 was begun
             before and may have been done.
    state:   of `ActionState`.
    """

    __tablename__ = "actions"
    __table_args__ = (UniqueConstraint("run_id", "group", "place", "index"),)
    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    run_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("plan_runs.id"), index=True)
    group: Mapped[int]
    place: Mapped[str] = mapped_column(String(_CODE))
    index: Mapped[int]
    name: Mapped[str] = mapped_column(String(_NAME))
    kind: Mapped[str] = mapped_column(String(_CODE))
    state: Mapped[str] = mapped_column(String(_CODE))
    attempt: Mapped[int] = mapped_column(default=0)
    began_ns: Mapped[int] = mapped_column(default=0)
    ended_ns: Mapped[int | None]
    exit_code: Mapped[int | None]
    detail: Mapped[str] = mapped_column(Text, default="")
    output: Mapped[str] = mapped_column(Text, default="")
    resumed_by: Mapped[str] = mapped_column(String(_NAME), default="")
    note: Mapped[str] = mapped_column(Text, default="")


class StoredPoints(Base):
    """The newest list of a machine's points that its applier put (`PointList`)."""

    __tablename__ = "point_lists"
    machine_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("machines.id"), primary_key=True)
    applier_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"))
    heard_ns: Mapped[int]
    document: Mapped[dict[str, Any]]


class StoredEvidence(Base):
    """A VM's console or screenshot as its compute node put it last. ``kind``: `EvidenceKind`."""

    __tablename__ = "evidence"
    vm_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(_CODE), primary_key=True)
    failover_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("failovers.id"), index=True)
    heard_ns: Mapped[int] = mapped_column(index=True)
    content: Mapped[bytes] = mapped_column(LargeBinary)

"""From a plan to a run: what is known of its machines, whether it may run, and the run's document.

Source: docs/RECOVERY.md §4, §5.
"""

import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.nodes.report_book import newest_of
from appliance.config_server.protection.requests import Asking
from appliance.config_server.protection.table import RECOVERING, TESTABLE, State
from appliance.config_server.protection.transition import REMOVING
from appliance.config_server.protection.workflow import Ports, store_of
from appliance.config_server.recovery.actions.runner import refused_actions
from appliance.config_server.recovery.config import RecoveryConfig
from appliance.config_server.recovery.plans.catalogue import document_of, find_plan, refuse_fatal
from appliance.config_server.recovery.plans.document import (
    PlanAction,
    PlanDocument,
    PlanGroup,
    PlanMachine,
)
from appliance.config_server.recovery.plans.plan import Plan, Problem
from appliance.config_server.recovery.plans.validation import (
    Facts,
    MachineFacts,
    facts_of,
    validate,
)
from appliance.config_server.recovery.requests import begin_run
from appliance.config_server.recovery.run import (
    ACTION_SECONDS_DEFAULT,
    FailoverKind,
    FailoverOptions,
    RunAction,
    RunGroup,
    RunMachine,
    RunPlan,
)
from appliance.config_server.store.recovery_tables import Plan as PlanRow
from appliance.config_server.store.schema import Job, Machine, Node

PLANS_READ_AT_ONCE = 20


class RunRequest(BaseModel):
    """How a plan, or the machine of a drill, is to be run.

    options: how the VM of a machine alone is made; a plan says so itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: FailoverKind = FailoverKind.TEST
    point: str = "latest"
    network: str | None = None
    compute: str | None = None
    wait_seconds: int = 120
    shut_down: bool = True
    notes: str = ""
    options: FailoverOptions = FailoverOptions()


async def read_facts(
    session: AsyncSession, ports: Ports, config: RecoveryConfig, plan: Plan
) -> Facts:
    """What is known of a plan's machines, and which of its actions would be refused here."""
    references = [member.reference for member in plan.members]
    ids = [found for found in map(_uuid, references) if found is not None]
    rows = (
        await session.scalars(
            select(Machine).where(or_(Machine.name.in_(references), Machine.id.in_(ids)))
        )
    ).all()
    others = await _other_plans(session, plan.name)
    machines = tuple([await _machine_facts(session, ports, row, others) for row in rows])
    return facts_of(machines, refused_actions(config, plan))


async def _machine_facts(
    session: AsyncSession, ports: Ports, row: Machine, others: Mapping[str, set[str]]
) -> MachineFacts:
    applier = await session.get(Node, row.applier_id) if row.applier_id else None
    store = None
    if applier is not None:
        store = store_of(newest_of(applier, ports.newest(applier.id)), row.id)
    busy = ""
    if row.job_id is not None:
        busy = f"a job is at work on it: {row.job_id}"
    elif row.state in RECOVERING:
        busy = f"it is {row.state} already"
    plans = others.get(row.name.lower(), set()) | others.get(str(row.id), set())
    return MachineFacts(
        id=row.id,
        name=row.name,
        state=row.state,
        protected=(row.state in TESTABLE or State(row.state) in RECOVERING)
        and row.points != REMOVING,
        newest_ns=store.newest_ns if store is not None else 0,
        newest_app_ns=store.newest_app_ns if store is not None else 0,
        points_known=store is not None,
        busy=busy,
        other_plans=tuple(sorted(plans)),
    )


async def _other_plans(session: AsyncSession, name: str) -> Mapping[str, set[str]]:
    """Names of other plans by the references of their machines, in small letters. Documents may be
    large (scripts): a few of them at a time.
    """
    found: dict[str, set[str]] = {}
    query = select(PlanRow.name, PlanRow.document).where(PlanRow.name != name)
    few = query.execution_options(yield_per=PLANS_READ_AT_ONCE)
    async for row in await session.stream(few):
        for group in row.document["groups"]:
            for machine in group["machines"]:
                found.setdefault(machine["machine"].lower(), set()).add(row.name)
    return found


async def validate_plan(
    session: AsyncSession,
    ports: Ports,
    config: RecoveryConfig,
    document: PlanDocument,
    *,
    kind: FailoverKind = FailoverKind.TEST,
    point: str = "latest",
) -> tuple[tuple[Problem, ...], Facts]:
    """All that is wrong with a plan as things are, and what it was held against."""
    plan = Plan.of(document)
    facts = await read_facts(session, ports, config, plan)
    return validate(plan, facts, kind=kind, choice=point), facts


async def begin_plan(
    asking: Asking,
    config: RecoveryConfig,
    name: str,
    request: RunRequest,
    *,
    drill: uuid.UUID | None = None,
) -> Job:
    """Begin a run of a plan. Raises NotFoundError, PlanError that says why it cannot run now."""
    row = await find_plan(asking.session, name)
    document = document_of(row)
    problems, facts = await validate_plan(
        asking.session, asking.ports, config, document, kind=request.kind, point=request.point
    )
    refuse_fatal(problems)
    return await begin_run(
        asking,
        request.kind,
        run_plan(document, facts, request),
        network=request.network,
        compute=request.compute,
        notes=request.notes,
        drill=drill,
    )


def run_plan(document: PlanDocument, facts: Facts, request: RunRequest) -> RunPlan:
    """The run of a plan whose machines are all known."""
    return RunPlan(
        plan=document.name,
        on_failure=document.on_failure,
        groups=tuple(_group(group, facts, request) for group in document.groups),
    )


def _group(group: PlanGroup, facts: Facts, request: RunRequest) -> RunGroup:
    return RunGroup(
        machines=tuple(_machine(one, facts, request) for one in group.machines),
        before=tuple(map(_action, group.before)),
        after=tuple(map(_action, group.after)),
    )


def _machine(one: PlanMachine, facts: Facts, request: RunRequest) -> RunMachine:
    known = facts.find(one.machine)
    assert known is not None, "validation has found all machines"
    options = FailoverOptions(
        guest=one.guest,
        script=one.script,
        cpu_count=one.cpu_count,
        memory_bytes=one.memory_bytes,
        check_seconds_max=one.check_seconds_max,
        wait_seconds=request.wait_seconds,
        shut_down=request.shut_down,
    )
    return RunMachine(id=known.id, point=request.point, options=options)


def _action(action: PlanAction) -> RunAction:
    spec: dict[str, Any]
    seconds_max = ACTION_SECONDS_DEFAULT
    if action.script is not None:
        spec, seconds_max = action.script.model_dump(mode="json"), action.script.seconds_max
    elif action.webhook is not None:
        spec, seconds_max = action.webhook.model_dump(mode="json"), action.webhook.seconds_max
    else:
        assert action.manual is not None
        spec = action.manual.model_dump(mode="json")
    return RunAction(
        name=action.name,
        kind=action.kind,
        spec=spec,
        seconds_max=seconds_max,
        on_failure=action.on_failure,
    )


def _uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None

"""``plans``: recovery plans, whether they can run, and their runs."""

from http import HTTPStatus
from typing import Annotated

from fastapi import Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Count64, Name, NameInPath, Router, ServerOf
from appliance.config_server.api.routes.jobs import JobDocument
from appliance.config_server.api.routes.runs import RunSummary, summaries
from appliance.config_server.caller import Caller
from appliance.config_server.protection.requests import Asking
from appliance.config_server.recovery.plans.catalogue import (
    change_plan,
    clone_plan,
    create_plan,
    delete_plan,
    document_of,
    find_plan,
)
from appliance.config_server.recovery.plans.document import PlanDocument
from appliance.config_server.recovery.plans.plan import Problem
from appliance.config_server.recovery.plans.running import RunRequest, begin_plan, validate_plan
from appliance.config_server.recovery.plans.secrets import hide_headers
from appliance.config_server.recovery.requests import NOTES_CHARACTERS_MAX
from appliance.config_server.recovery.run import (
    WAIT_SECONDS_DEFAULT,
    WAIT_SECONDS_MAX,
    FailoverKind,
)
from appliance.config_server.server import Server
from appliance.config_server.store.recovery_tables import Plan, PlanRun
from replication.control.role import OperatorRole

router = Router("plans")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Operator = Annotated[Caller, needs(OperatorRole.OPERATOR)]
Contributor = Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]
PointText = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")]
NoteText = Annotated[str, Field(max_length=NOTES_CHARACTERS_MAX, pattern=r"^[^\x00]*$")]


class PlanSummary(BaseModel):
    """A plan in a list."""

    name: str
    description: str
    group_count: int
    machine_count: int
    created_by: str
    created_ns: int
    updated_ns: int
    revision: int


class ProblemDocument(BaseModel):
    """Something that is wrong with a plan.

    where: its place in the document, as ``groups.0.machines.1``. fatal: it cannot run so.
    """

    code: str
    where: str
    message: str
    hint: str
    fatal: bool

    @classmethod
    def of(cls, problem: Problem) -> "ProblemDocument":
        return cls(
            code=problem.code,
            where=problem.where,
            message=problem.message,
            hint=problem.hint,
            fatal=problem.fatal,
        )


class PlanAnswer(BaseModel):
    """A plan. Values of webhooks' headers are hidden; written back so, they stay.

    problems: what would stand against a test of it now.
    """

    plan: PlanDocument
    created_by: str
    created_ns: int
    updated_ns: int
    revision: int
    problems: list[ProblemDocument]


class PlanChange(BaseModel):
    """A plan to take another's place. ``revision``: the one that was read, where that matters."""

    model_config = ConfigDict(extra="forbid")

    plan: PlanDocument
    revision: Count64 | None = None


class CloneRequest(BaseModel):
    """What the copy is to be called."""

    model_config = ConfigDict(extra="forbid")

    name: Name


class Validation(BaseModel):
    """Whether a plan could run now. ``problems``: what is fatal first."""

    valid: bool
    problems: list[ProblemDocument]


class PlanRunRequest(BaseModel):
    """How a plan is to be run.

    point:   of each machine, a choice; its own name fits one machine alone.
    network: of the compute node; none: its default one, for a test one of its own.
    """

    model_config = ConfigDict(extra="forbid")

    kind: FailoverKind
    point: PointText = "latest"
    network: Name | None = None
    compute: Name | None = None
    wait_seconds: Annotated[int, Field(ge=0, le=WAIT_SECONDS_MAX)] = WAIT_SECONDS_DEFAULT
    shut_down: bool = True
    notes: NoteText = ""

    def request(self) -> RunRequest:
        return RunRequest(**self.model_dump())


@router.get("")
async def list_plans(server: ServerOf, paging: PagingOf, _: Reader) -> Page[PlanSummary]:
    """List the plans by name."""
    async with server.database.reading() as session:
        rows, following = await read_page(session, select(Plan), [Plan.name], paging)
    return Page(items=[_summary(row) for row in rows], next=following)


@router.get("/{name}")
async def read_plan(server: ServerOf, name: NameInPath, _: Reader) -> PlanAnswer:
    """One plan, whole."""
    async with server.database.reading() as session:
        row = await find_plan(session, name)
    return await _answer(server, row)


@router.post("", status_code=HTTPStatus.CREATED)
async def create(server: ServerOf, caller: Contributor, request: PlanDocument) -> PlanAnswer:
    """Make a plan. Machines need not be there yet: `problems` says so."""
    async with server.change(caller, "plan.create", request.name) as session:
        row = await create_plan(
            session, server.identity.vault, request, who=caller.name, now_ns=server.clock()
        )
    return await _answer(server, row)


@router.put("/{name}")
async def change(
    server: ServerOf, caller: Contributor, name: NameInPath, request: PlanChange
) -> PlanAnswer:
    """Put another plan in its place, also of another name. Runs under way do not change."""
    detail = {"name": request.plan.name, "revision": request.revision}
    async with server.change(caller, "plan.change", name, detail) as session:
        row = await change_plan(
            session,
            server.identity.vault,
            name,
            request.plan,
            revision=request.revision,
            now_ns=server.clock(),
        )
    return await _answer(server, row)


@router.delete("/{name}", status_code=HTTPStatus.NO_CONTENT)
async def delete(server: ServerOf, caller: Contributor, name: NameInPath) -> Response:
    """Delete a plan of which no drills are scheduled. Its runs are kept."""
    async with server.change(caller, "plan.delete", name) as session:
        await delete_plan(session, name)
    return Response(status_code=HTTPStatus.NO_CONTENT)


@router.post("/{name}/clone", status_code=HTTPStatus.CREATED)
async def clone(
    server: ServerOf, caller: Contributor, name: NameInPath, request: CloneRequest
) -> PlanAnswer:
    """Copy a plan, its webhooks' headers too."""
    async with server.change(caller, "plan.clone", name, {"name": request.name}) as session:
        row = await clone_plan(session, name, request.name, who=caller.name, now_ns=server.clock())
    return await _answer(server, row)


@router.get("/{name}/validation")
async def validation(
    server: ServerOf,
    name: NameInPath,
    _: Reader,
    kind: FailoverKind = FailoverKind.TEST,
    point: Annotated[str, Query(min_length=1, max_length=255, pattern=r"^[^\x00]+$")] = "latest",
) -> Validation:
    """Whether a plan could run now, and if not, why."""
    async with server.database.reading() as session:
        row = await find_plan(session, name)
        problems, _facts = await validate_plan(
            session,
            server.protection.ports,
            server.config.recovery,
            document_of(row),
            kind=kind,
            point=point,
        )
    return Validation(
        valid=not any(problem.fatal for problem in problems),
        problems=[ProblemDocument.of(problem) for problem in problems],
    )


@router.post("/{name}/runs", status_code=HTTPStatus.ACCEPTED)
async def run(
    server: ServerOf, caller: Operator, name: NameInPath, request: PlanRunRequest
) -> JobDocument:
    """Run a plan: one job over all its machines."""
    detail = request.model_dump(mode="json", exclude={"notes"})
    async with server.change(caller, "plan.run", name, detail) as session:
        asking = Asking(session, server.protection.ports, server.clock(), caller.name)
        job = await begin_plan(asking, server.config.recovery, name, request.request())
    await server.protection.begin(job.id)
    return JobDocument.of(job)


@router.get("/{name}/runs")
async def list_runs(
    server: ServerOf, name: NameInPath, paging: PagingOf, _: Reader
) -> Page[RunSummary]:
    """List a plan's runs, the newest first; also of a plan that is deleted."""
    query = select(PlanRun).where(PlanRun.plan == name)
    async with server.database.reading() as session:
        rows, following = await read_page(
            session, query, [PlanRun.asked_ns, PlanRun.id], paging, descending=True
        )
        if not rows and paging.cursor is None:
            await find_plan(session, name)
        items = await summaries(session, rows)
    return Page(items=items, next=following)


def _summary(row: Plan) -> PlanSummary:
    groups = row.document["groups"]
    return PlanSummary(
        name=row.name,
        description=row.document.get("description", ""),
        group_count=len(groups),
        machine_count=sum(len(group["machines"]) for group in groups),
        created_by=row.created_by,
        created_ns=row.created_ns,
        updated_ns=row.updated_ns,
        revision=row.revision,
    )


async def _answer(server: Server, row: Plan) -> PlanAnswer:
    document = document_of(row)
    async with server.database.reading() as session:
        problems, _ = await validate_plan(
            session, server.protection.ports, server.config.recovery, document
        )
    return PlanAnswer(
        plan=hide_headers(document),
        created_by=row.created_by,
        created_ns=row.created_ns,
        updated_ns=row.updated_ns,
        revision=row.revision,
        problems=[ProblemDocument.of(problem) for problem in problems],
    )

"""``drill-schedules``: when drills are held."""

from http import HTTPStatus
from typing import Annotated

from fastapi import Response
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from appliance.config_server.api.access import needs
from appliance.config_server.api.paging import Page, PagingOf, read_page
from appliance.config_server.api.router import Name, NameInPath, Router, ServerOf
from appliance.config_server.api.routes.drills import DrillRequest
from appliance.config_server.caller import Caller
from appliance.config_server.recovery.drills.holding import (
    ScheduleDocument,
    add_schedule,
    delete_schedule,
    machine_of,
)
from appliance.config_server.recovery.drills.schedule import Timing
from appliance.config_server.recovery.plans.running import RunRequest
from appliance.config_server.store.recovery_tables import DrillSchedule
from appliance.config_server.store.schema import Machine
from replication.control.role import OperatorRole

router = Router("drill-schedules")
Reader = Annotated[Caller, needs(OperatorRole.READER)]
Contributor = Annotated[Caller, needs(OperatorRole.CONTRIBUTOR)]


class ScheduleRequest(DrillRequest):
    """A drill that is held again and again."""

    name: Name
    timing: Timing


class ScheduleAnswer(BaseModel):
    """A schedule. ``told``: its timing for people. last_ns: 0 when there was none yet."""

    name: str
    plan: str
    machine: str
    timing: Timing
    told: str
    request: RunRequest
    next_ns: int
    last_ns: int
    created_by: str
    created_ns: int


@router.get("")
async def list_schedules(server: ServerOf, paging: PagingOf, _: Reader) -> Page[ScheduleAnswer]:
    """List the schedules by name."""
    async with server.database.reading() as session:
        rows, following = await read_page(
            session, select(DrillSchedule), [DrillSchedule.name], paging
        )
        items = [await _answer(session, row) for row in rows]
    return Page(items=items, next=following)


@router.post("", status_code=HTTPStatus.CREATED)
async def create(server: ServerOf, caller: Contributor, request: ScheduleRequest) -> ScheduleAnswer:
    """Schedule drills of a plan or a machine."""
    detail = request.model_dump(mode="json", exclude={"notes", "script"}, exclude_none=True)
    now_ns = server.clock()
    async with server.change(caller, "drill.schedule", request.name, detail) as session:
        machine = None
        if request.machine is not None:
            machine = (await machine_of(session, request.machine, now_ns)).id
        row = await add_schedule(
            session,
            request.name,
            ScheduleDocument(timing=request.timing, request=request.request()),
            plan=request.plan or "",
            machine=machine,
            who=caller.name,
            now_ns=now_ns,
        )
        return await _answer(session, row)


@router.delete("/{name}", status_code=HTTPStatus.NO_CONTENT)
async def delete(server: ServerOf, caller: Contributor, name: NameInPath) -> Response:
    """Hold no more drills of it; the reports are kept."""
    async with server.change(caller, "drill.unschedule", name) as session:
        await delete_schedule(session, name)
    return Response(status_code=HTTPStatus.NO_CONTENT)


async def _answer(session: AsyncSession, row: DrillSchedule) -> ScheduleAnswer:
    document = ScheduleDocument.model_validate(row.document)
    machine = await session.get(Machine, row.machine_id) if row.machine_id else None
    return ScheduleAnswer(
        name=row.name,
        plan=row.plan,
        machine=machine.name if machine is not None else "",
        timing=document.timing,
        told=document.timing.told(),
        request=document.request,
        next_ns=row.next_ns,
        last_ns=row.last_ns,
        created_by=row.created_by,
        created_ns=row.created_ns,
    )

"""Actions of a run: what is done before and after a group's VMs are started.

An attempt is written down before it begins. One that was under way when the config server ended is
begun again with the next number: it is done at least once.

Source: docs/RECOVERY.md §5.
"""

import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from sqlalchemy import select

from appliance.config_server.protection.workflow import (
    Done,
    Outside,
    StepFailedError,
    Verdict,
    Waiting,
)
from appliance.config_server.recovery.ports import ActedVm, ActionOrder, ActionOutcome, ActionPort
from appliance.config_server.recovery.run import (
    OUTPUT_CHARACTERS_MAX,
    ActionKind,
    ActionPlace,
    ActionState,
    FailoverKind,
    OnFailure,
    RunAction,
)
from appliance.config_server.recovery.scene import RecoveryScene
from appliance.config_server.store.recovery_tables import Failover, PlanAction, RecoveredVm
from appliance.config_server.store.schema import Node

DETAIL_CHARACTERS_MAX = 2000


@dataclass(frozen=True, slots=True)
class Turn:
    """Which action of a run it is. ``group`` and ``index`` count from 0."""

    group: int
    place: ActionPlace
    index: int


@dataclass(frozen=True, slots=True)
class ActionSteps:
    """Steps that have actions done."""

    port: ActionPort

    def act(self, turn: Turn) -> Callable[[RecoveryScene], Awaitable[Verdict]]:
        """The step of one action."""

        async def act(scene: RecoveryScene) -> Verdict:
            action = scene.plan.groups[turn.group].actions(turn.place)[turn.index]
            row = await _row_of(scene, turn, action)
            state = ActionState(row.state)
            if state is ActionState.DONE:
                return Done(_told(row))
            if state is ActionState.FAILED:
                return _failed(action, row)
            if action.kind is ActionKind.MANUAL:
                row.state = ActionState.WAITING
                return Waiting(_instruction(action))
            row.attempt += 1
            row.began_ns = scene.now_ns
            order = await _order(scene, turn, action, row)
            note = f"runs, attempt {row.attempt}, {action.seconds_max} s at most"
            return Outside(note, self._doing(order))

        return act

    def _doing(
        self, order: ActionOrder
    ) -> Callable[[], Awaitable[Callable[[RecoveryScene], Awaitable[None]]]]:
        async def do() -> Callable[[RecoveryScene], Awaitable[None]]:
            try:
                outcome = await self.port.run(order)
            except Exception as error:  # noqa: BLE001 - told by what failed, and by the log
                # Else the job would be begun again, and the action done again, without end.
                structlog.get_logger().exception("an action cannot be run", action=order.name)
                outcome = ActionOutcome(succeeded=False, detail=f"a defect: {error!r}")

            async def record(scene: RecoveryScene) -> None:
                row = await scene.session.get_one(PlanAction, order.id)
                _take(row, outcome, scene.now_ns)

            return record

        return do


async def _row_of(scene: RecoveryScene, turn: Turn, action: RunAction) -> PlanAction:
    row = await scene.session.scalar(
        select(PlanAction).where(
            PlanAction.run_id == scene.run.id,
            PlanAction.group == turn.group,
            PlanAction.place == turn.place,
            PlanAction.index == turn.index,
        )
    )
    if row is None:
        row = PlanAction(
            id=uuid.uuid4(),
            run_id=scene.run.id,
            group=turn.group,
            place=turn.place,
            index=turn.index,
            name=action.name,
            kind=action.kind,
            state=ActionState.RUNNING,
            attempt=0,
            began_ns=scene.now_ns,
        )
        scene.session.add(row)
    return row


def _take(row: PlanAction, outcome: ActionOutcome, now_ns: int) -> None:
    row.state = ActionState.DONE if outcome.succeeded else ActionState.FAILED
    row.ended_ns = now_ns
    row.exit_code = outcome.exit_code
    row.detail = _stored(outcome.detail)[:DETAIL_CHARACTERS_MAX]
    row.output = _stored(outcome.output)[-OUTPUT_CHARACTERS_MAX:]


def _stored(text: str) -> str:
    """As a column takes it; PostgreSQL has no NUL, and no half of a character."""
    return text.replace("\0", "\\0").encode(errors="replace").decode()


def _failed(action: RunAction, row: PlanAction) -> Verdict:
    why = row.detail or f"it ended with {row.exit_code}"
    if action.on_failure is OnFailure.CONTINUE:
        return Done(f"failed: {why}; gone on")
    raise StepFailedError(
        f"the action {action.name} failed: {why}",
        code="action_failed",
        hint="its output is with the run; mend what it names, then run the plan again",
    )


def _told(row: PlanAction) -> str:
    if row.resumed_by:
        return f"resumed by {row.resumed_by}" + (f": {row.note}" if row.note else "")
    return f"attempt {row.attempt}" if row.attempt > 1 else ""


def _instruction(action: RunAction) -> str:
    told = str(action.spec.get("instruction", ""))
    return f"waits for somebody to resume the job: {told or action.name}"


async def _order(
    scene: RecoveryScene, turn: Turn, action: RunAction, row: PlanAction
) -> ActionOrder:
    """The action with what it is told of the run."""
    found = await scene.session.execute(
        select(Failover, RecoveredVm, Node.name)
        .outerjoin(RecoveredVm, RecoveredVm.id == Failover.vm_id)
        .join(Node, Node.id == Failover.compute_id)
        .where(Failover.run_id == scene.run.id)
        .order_by(Failover.group, Failover.machine)
    )
    return ActionOrder(
        id=row.id,
        name=action.name,
        kind=action.kind,
        spec=action.spec,
        seconds_max=action.seconds_max,
        attempt=row.attempt,
        run=scene.run.id,
        plan=scene.run.plan,
        failover=FailoverKind(scene.run.kind),
        group=turn.group + 1,
        place=turn.place,
        vms=tuple(
            ActedVm(
                machine=failover.machine_id,
                name=failover.machine,
                group=failover.group + 1,
                state=failover.state,
                vm=failover.vm_id,
                address=(vm.report or {}).get("address", "") if vm is not None else "",
                compute=compute,
                point=failover.point,
            )
            for failover, vm, compute in found
        ),
    )

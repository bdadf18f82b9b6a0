"""The jobs of recovery, step by step.

The steps of a failover are made for its run, and named so that they are found again by their names:
``group 2: start``, ``group 2: before 1: stop the load balancer``; without the group for a machine
alone.

Source: docs/RECOVERY.md §4.
"""

import re
from types import MappingProxyType

from appliance.config_server.protection.jobs import JobError, JobKind
from appliance.config_server.protection.workflow import Step, Verdict, Workflow, Workflows
from appliance.config_server.recovery import afterwards
from appliance.config_server.recovery.abandoning import end_run, let_failovers_go
from appliance.config_server.recovery.acting import ActionSteps, Turn
from appliance.config_server.recovery.failing_over import FailoverSteps
from appliance.config_server.recovery.parts import fail_over, failed_of, take_back
from appliance.config_server.recovery.ports import NoActions, NoPower, RecoveryPorts
from appliance.config_server.recovery.run import (
    ActionPlace,
    FailoverKind,
    FailoverState,
    RunPlan,
)
from appliance.config_server.recovery.scene import RecoveryScene, open_run, run_nodes
from appliance.config_server.recovery.switching_off import SwitchingOff

FINAL = "final changeset"
SHUT_DOWN = "shut down"
HOLD = "hold the points"
DISKS = "make the disks"
START = "start"
CHECK = "check"
_GROUP = re.compile(r"^(?:group (\d+): )?(?:(start|check)|(before|after) (\d+): .*)$")

RecoveryStep = Step[RecoveryScene]


def steps_of_run(kind: FailoverKind, plan: RunPlan) -> tuple[str, ...]:
    """The names of all steps, in their order."""
    names = [FINAL] if kind is FailoverKind.PLANNED else []
    if kind is not FailoverKind.TEST:
        names.append(SHUT_DOWN)
    names += [HOLD, DISKS]
    for number, group in enumerate(plan.groups, 1):
        prefix = f"group {number}: " if plan.plan else ""
        names += _action_names(prefix, group.before, ActionPlace.BEFORE)
        names += [f"{prefix}{START}", f"{prefix}{CHECK}"] if group.machines else []
        names += _action_names(prefix, group.after, ActionPlace.AFTER)
    return tuple(names)


def _action_names(prefix: str, actions: tuple[object, ...], place: ActionPlace) -> list[str]:
    return [
        f"{prefix}{place} {number}: {getattr(action, 'name', '')}"
        for number, action in enumerate(actions, 1)
    ]


def recovery_workflows(ports: RecoveryPorts, *, answer_seconds_max: float) -> Workflows:
    """All of them."""
    steps = FailoverSteps(int(answer_seconds_max * 1e9))
    actions = ActionSteps(ports.actions)
    switching = SwitchingOff(ports.power)
    found = (
        _run(JobKind.TEST_FAILOVER, steps, switching, actions),
        _run(JobKind.FAILOVER, steps, switching, actions),
        *_ends(steps.answer_ns),
        _change(steps),
    )
    return MappingProxyType({workflow.kind: workflow for workflow in found})


def _run(
    kind: JobKind, steps: FailoverSteps, switching: SwitchingOff, actions: ActionSteps
) -> Workflow[RecoveryScene]:
    def find(name: str) -> RecoveryStep | None:
        found = _GROUP.match(name)
        if found is None:
            return None
        group = int(found[1] or 1) - 1
        if found[3]:
            turn = Turn(group, ActionPlace(found[3]), int(found[4]) - 1)
            return Step(name, actions.act(turn), is_patient=True)
        act = steps.start(group) if found[2] == START else steps.check(group)
        return Step(name, act, is_patient=True)

    return Workflow(
        kind,
        (
            Step(FINAL, steps.send_final, is_patient=True),
            Step(SHUT_DOWN, switching.shut_down, is_patient=True),
            Step(HOLD, steps.hold_points, is_patient=True),
            Step(DISKS, steps.make_disks, is_patient=True),
        ),
        open_run,
        run_nodes,
        _done,
        _undone,
        let_failovers_go,
        find,
    )


def _ends(answer_ns: int) -> tuple[Workflow[RecoveryScene], ...]:
    gone: tuple[RecoveryStep, ...] = (
        Step("remove the virtual machines", afterwards.remove),
        Step(
            "they are gone",
            afterwards.are_gone,
            late=afterwards.GONE_LATE,
            hint=afterwards.GONE_HINT,
        ),
    )

    async def make_independent(scene: RecoveryScene) -> Verdict:
        return await afterwards.make_independent(scene, answer_ns)

    return (
        Workflow(
            JobKind.CLEANUP,
            gone,
            open_run,
            run_nodes,
            afterwards.cleaned,
            afterwards.not_cleaned,
            let_failovers_go,
        ),
        Workflow(
            JobKind.CANCEL_FAILOVER,
            gone,
            open_run,
            run_nodes,
            afterwards.cancelled,
            afterwards.not_cancelled,
            let_failovers_go,
        ),
        Workflow(
            JobKind.COMMIT,
            (
                Step("make the disks stand alone", make_independent, is_patient=True),
                Step("let go of the point", afterwards.let_go),
            ),
            open_run,
            run_nodes,
            afterwards.committed,
            afterwards.unchanged,
            let_failovers_go,
        ),
    )


def _change(steps: FailoverSteps) -> Workflow[RecoveryScene]:
    change = afterwards.PointChange(steps)
    return Workflow(
        JobKind.CHANGE_POINT,
        (
            Step("hold the point", change.hold, is_patient=True),
            Step("make the disks", change.make_disks, is_patient=True),
            Step(
                "switch over",
                change.switch,
                late="the compute node did not switch the old virtual machine off",
                hint="see that it runs and reaches the config server, then ask again",
            ),
            Step("check", change.check, is_patient=True),
            Step("the old virtual machine is gone", change.old_is_gone),
        ),
        open_run,
        run_nodes,
        afterwards.unchanged,
        change.undo,
        let_failovers_go,
    )


async def _done(scene: RecoveryScene) -> JobError | None:
    """Those that are up stay; where some have failed, the job says so."""
    for part in scene.parts:
        await fail_over(scene, part)
    scene.run.ended_ns = scene.now_ns
    failed = await failed_of(scene)
    if not failed:
        return None
    names = ", ".join(row.machine for row in failed)
    return JobError(
        code="partly_failed",
        message=f"{len(failed)} machines failed: {names}",
        hint="their failovers say why; the others are up",
    )


async def _undone(scene: RecoveryScene) -> None:
    """A run that fails leaves what is up; one that is cancelled takes everything back."""
    is_cancelled = scene.job.error is None
    for part in scene.parts:
        if part.state is FailoverState.UP and not is_cancelled:
            await fail_over(scene, part)
            continue
        if not is_cancelled:
            part.failover.error = scene.job.error
        await take_back(
            scene, part, FailoverState.CANCELLED if is_cancelled else FailoverState.FAILED
        )
    await end_run(scene.session, scene.job, scene.now_ns)


STEPS = MappingProxyType(
    {
        kind: tuple(step.name for step in workflow.steps)
        for kind, workflow in recovery_workflows(
            RecoveryPorts(NoActions(), NoPower()), answer_seconds_max=0
        ).items()
        if workflow.find is None
    }
)
"""The names of the steps of those kinds whose jobs all have the same."""

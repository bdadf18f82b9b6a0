"""A run as a document: what is to be recovered, in which order, and what is done in between.

A machine alone is a run of one group. The document is kept in the run's row, so that a plan that
changes meanwhile changes nothing of it.

Source: docs/RECOVERY.md §4, §5, §8.
"""

import uuid
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from replication.control.recovery import GuestChoice, PointChoice, Script
from replication.control.value import Text

GROUPS_MAX = 7
GROUP_MACHINES_MAX = 100
ACTIONS_MAX = 20
"""Before or after one group."""

ACTION_SECONDS_DEFAULT = 600
ACTION_SECONDS_MAX = 86400
WAIT_SECONDS_DEFAULT = 120
WAIT_SECONDS_MAX = 86400
OUTPUT_CHARACTERS_MAX = (64 << 10) + 128
"""Of an action: the end of what it wrote."""


class FailoverKind(StrEnum):
    """TEST changes nothing of the machine. PLANNED loses nothing, UNPLANNED needs no source."""

    TEST = "test"
    PLANNED = "planned"
    UNPLANNED = "unplanned"


class FailoverState(StrEnum):
    """How one machine's failover is.

    STARTING:  its job is at work.
    UP:        its VM has passed the check; a test waits to be cleaned up, another one for commit,
               cancellation or another point.
    FAILED:    it came to nothing; what it had begun is undone.
    CLEANING:  a test (or what was committed, when the machine is not protected any more) goes.
    CLEANED:   nothing is left but this row and the evidence.
    CANCELLING, CANCELLED: the same of a failover that was taken back.
    COMMITTED: the VM stands alone.
    """

    STARTING = "starting"
    UP = "up"
    FAILED = "failed"
    CLEANING = "cleaning-up"
    CLEANED = "cleaned-up"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    COMMITTED = "committed"


OPEN = (
    FailoverState.STARTING,
    FailoverState.UP,
    FailoverState.CLEANING,
    FailoverState.CANCELLING,
    FailoverState.COMMITTED,
)
"""States in which there is, or may be, a VM."""


class OnFailure(StrEnum):
    """What a failed machine or action does to its run. STOP: nothing after it is begun."""

    STOP = "stop"
    CONTINUE = "continue"


class ActionKind(StrEnum):
    """MANUAL waits until somebody resumes the job."""

    SCRIPT = "script"
    MANUAL = "manual"
    WEBHOOK = "webhook"


class ActionPlace(StrEnum):
    """When an action's turn is: before its group's VMs are started, or after they are checked."""

    BEFORE = "before"
    AFTER = "after"


class ActionState(StrEnum):
    """RUNNING: under way, or was when the config server ended. WAITING: for a person."""

    RUNNING = "running"
    WAITING = "waiting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FailoverOptions(_Document):
    """How the VM is made, and how long is waited for what.

    wait_seconds: for the point of `latest`; then what is processed is taken.
    shut_down:    unplanned: switch the source off if it can be.
    """

    guest: GuestChoice = GuestChoice.AUTO
    script: Script = ""
    cpu_count: Annotated[int, Field(ge=1, le=64)] = 1
    memory_bytes: Annotated[int, Field(ge=64 << 20, le=1 << 40)] = 512 << 20
    check_seconds_max: Annotated[int, Field(ge=1, le=86400)] = 300
    wait_seconds: Annotated[int, Field(ge=0, le=WAIT_SECONDS_MAX)] = WAIT_SECONDS_DEFAULT
    shut_down: bool = True


class RunMachine(_Document):
    """A machine of a run. ``point``: a `PointChoice`, or the name of one of its points."""

    id: uuid.UUID
    point: Text = PointChoice.LATEST.value
    options: FailoverOptions = FailoverOptions()


class RunAction(_Document):
    """Something to be done before or after a group.

    spec:        what its kind needs (`recovery.ports.ActionPort` reads it); of a manual action
                 ``instruction``.
    seconds_max: then it has failed; a manual one waits without end.
    """

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]*$")]
    kind: ActionKind
    spec: dict[str, Any] = {}
    seconds_max: Annotated[int, Field(ge=1, le=ACTION_SECONDS_MAX)] = ACTION_SECONDS_DEFAULT
    on_failure: OnFailure = OnFailure.STOP


class RunGroup(_Document):
    """Machines that are started together, and what is done before and after."""

    machines: Annotated[tuple[RunMachine, ...], Field(max_length=GROUP_MACHINES_MAX)] = ()
    before: Annotated[tuple[RunAction, ...], Field(max_length=ACTIONS_MAX)] = ()
    after: Annotated[tuple[RunAction, ...], Field(max_length=ACTIONS_MAX)] = ()

    def actions(self, place: ActionPlace) -> tuple[RunAction, ...]:
        return self.before if place is ActionPlace.BEFORE else self.after


class RunPlan(_Document):
    """All groups in their order. ``plan``: its name; empty for a machine alone."""

    plan: Text = ""
    groups: Annotated[tuple[RunGroup, ...], Field(min_length=1, max_length=GROUPS_MAX)]
    on_failure: OnFailure = OnFailure.STOP

"""What jobs of recovery need done outside of the database, and by whom.

Everything here happens at least once: it is asked for again when the config server was killed
before the answer was written down. What is cancelled ends at once and leaves no process behind.

Source: docs/RECOVERY.md §1, §5.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from appliance.config_server.recovery.run import ActionKind, ActionPlace, FailoverKind
from replication.errors import UnavailableError


@dataclass(frozen=True, slots=True)
class ActedVm:
    """A machine of the run as its actions see it; empty where it has not come to that."""

    machine: uuid.UUID
    name: str
    group: int
    state: str
    vm: uuid.UUID | None = None
    address: str = ""
    compute: str = ""
    point: str = ""


@dataclass(frozen=True, slots=True)
class ActionOrder:
    """An action that is to be done now.

    attempt: 1 the first time; above 1 an earlier attempt may have been done, wholly or in part.
    group:   counts from 1, as people count.
    """

    id: uuid.UUID
    name: str
    kind: ActionKind
    spec: Mapping[str, Any]
    seconds_max: int
    attempt: int
    run: uuid.UUID
    plan: str
    failover: FailoverKind
    group: int
    place: ActionPlace
    vms: tuple[ActedVm, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class ActionOutcome:
    """What came of an action.

    exit_code: of a script, or the status of a webhook; none when there was no end (time limit).
    detail:    why it failed, in one sentence. output: the end of what it wrote.
    """

    succeeded: bool
    exit_code: int | None = None
    detail: str = ""
    output: str = ""


class ActionPort(Protocol):
    """Runs scripts and webhooks."""

    async def run(self, order: ActionOrder) -> ActionOutcome:
        """Do it, within ``order.seconds_max``. Whatever goes wrong is an outcome, no exception."""
        ...


class PowerPort(Protocol):
    """Switches source machines off, in their vCenter."""

    async def power_off(self, vm: uuid.UUID) -> None:
        """Returns when the VM (`VirtualMachine.id`) is off, also when it was before.

        Raises ReplicationError when that cannot be said.
        """
        ...


@dataclass(frozen=True, slots=True)
class RecoveryPorts:
    """Both of them."""

    actions: ActionPort
    power: PowerPort


class NoActions:
    """Where nobody runs actions: each fails and says so."""

    async def run(self, order: ActionOrder) -> ActionOutcome:
        return ActionOutcome(
            succeeded=False, detail=f"this config server cannot run a {order.kind}"
        )


class NoPower:
    """Where no vCenter can be asked."""

    async def power_off(self, vm: uuid.UUID) -> None:
        raise UnavailableError(
            f"no vCenter can be asked to switch the virtual machine {vm} off",
            hint="switch it off by hand, and fail over unplanned",
        )

"""What an action is told of its run: the JSON that Azure Site Recovery gives runbooks, and more.

ASR's own keys are ``RecoveryPlanName``, ``FailoverType``, ``FailoverDirection``, ``GroupId`` and
``VmMap``, whose values have ``SubscriptionId``, ``ResourceGroupName``, ``CloudServiceName``,
``RoleName`` and ``RecoveryPointId``; what has no counterpart here is empty.

Source: learn.microsoft.com/azure/site-recovery/site-recovery-runbook-automation;
docs/RECOVERY.md §5.
"""

import json
from typing import Any

from appliance.config_server.recovery.ports import ActedVm, ActionOrder
from appliance.config_server.recovery.run import FailoverKind

DIRECTION = "PrimaryToSecondary"
_TYPES = {
    FailoverKind.TEST: "Test",
    FailoverKind.PLANNED: "Planned",
    FailoverKind.UNPLANNED: "Unplanned",
}


def context_of(order: ActionOrder) -> dict[str, Any]:
    """The document. VMs are known by their own id, by the machine's until they have one."""
    return {
        "RecoveryPlanName": order.plan,
        "FailoverType": _TYPES[order.failover],
        "FailoverDirection": DIRECTION,
        "GroupId": str(order.group),
        "VmMap": {str(vm.vm or vm.machine): _vm(vm) for vm in order.vms},
        "ActionName": order.name,
        "Place": order.place.value,
        "Attempt": order.attempt,
        "RunId": str(order.run),
    }


def _vm(vm: ActedVm) -> dict[str, str]:
    return {
        "SubscriptionId": "",
        "ResourceGroupName": vm.compute,
        "CloudServiceName": "",
        "RoleName": vm.name,
        "RecoveryPointId": vm.point,
        "MachineId": str(vm.machine),
        "GroupId": str(vm.group),
        "State": vm.state,
        "Address": vm.address,
    }


def context_bytes(order: ActionOrder) -> bytes:
    """As it is written to standard input, or posted."""
    return json.dumps(context_of(order)).encode() + b"\n"

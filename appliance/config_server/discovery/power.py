"""Switching virtual machines on and off at their vCenter.

Each order logs in by itself, in a thread: the reader's session waits for changes most of the time.
A task is asked for its state through the property collector until it has ended: reading a task's
``info`` as an attribute races with its end.

Source: vSphere Web Services API, VirtualMachine (PowerOffVM_Task, PowerOnVM_Task), Task, TaskInfo.
"""

import asyncio
import time
import uuid
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar

import structlog
from pyVmomi import vim, vmodl

from appliance.config_server.discovery.reader import EXPIRED, TROUBLE, explain
from appliance.config_server.discovery.service import Vault, target_of
from appliance.config_server.discovery.target import Target
from appliance.config_server.discovery.vcenter import GONE, Session
from appliance.config_server.store.engine import Database
from appliance.config_server.store.schema import VCenter, VirtualMachine
from replication.errors import (
    ConflictError,
    NotFoundError,
    ReplicationError,
    UnavailableError,
)

TASK_SECONDS_MAX = 60.0
"""How long a vCenter may take to switch a VM."""

ORDER_SECONDS_MAX = 120.0
"""How long all of it may take, the login with it."""

LOOK_SECONDS = 0.2

_log = structlog.get_logger()
_vim: Any = vim
WRONG_STATE: type[Exception] = vim.fault.InvalidPowerState
NOT_ALLOWED: type[Exception] = vim.fault.NoPermission
MISTAKEN: type[Exception] = vmodl.MethodFault

T = TypeVar("T")


class VmPowerState(StrEnum):
    """What a vCenter says of a VM."""

    ON = "poweredOn"
    OFF = "poweredOff"
    SUSPENDED = "suspended"


class VCenterPower:
    """Switches the VMs of the inventory; `VirtualMachine.id` names one.

    All of it raises ReplicationError: NotFoundError for a VM that is not in the inventory or not in
    its vCenter any more, UnavailableError for a vCenter that cannot be reached or does not end in
    time, ConflictError for one that refuses.
    """

    def __init__(self, database: Database, vault: Vault) -> None:
        self._database = database
        self._vault = vault

    async def power_state(self, vm: uuid.UUID) -> VmPowerState:
        """What the vCenter says now."""
        return await self._at(vm, "asked for the power", _state)

    async def power_off(self, vm: uuid.UUID) -> None:
        """Returns when the VM is off, also when it was before: at once, as by a power cut."""
        await self._at(vm, "switched off", _switch_off)

    async def power_on(self, vm: uuid.UUID) -> None:
        """Returns when the VM is on, also when it was before."""
        await self._at(vm, "switched on", _switch_on)

    async def _at(self, vm: uuid.UUID, what: str, work: Callable[[Session, Any], T]) -> T:
        target, moid, name = await self._find(vm)

        def act() -> T:
            session = Session(target)
            try:
                if target.instance_uuid and session.instance_uuid != target.instance_uuid:
                    raise ConflictError(
                        f"{target.url} is another vCenter than the one that {name} was found in",
                        hint="correct its address: understudy vcenters",
                    )
                return work(session, session.virtual_machine(moid))
            finally:
                session.close()

        where = f"{name} cannot be {what}: the vCenter {target.name}"
        try:
            async with asyncio.timeout(ORDER_SECONDS_MAX):
                done = await asyncio.to_thread(act)
        except ReplicationError:
            raise
        except GONE as error:
            raise NotFoundError(
                f"{where} does not have it any more", hint="see `understudy vms`"
            ) from error
        except TimeoutError as error:
            raise UnavailableError(
                f"{where} does not end within {ORDER_SECONDS_MAX:.0f} s"
            ) from error
        except (NOT_ALLOWED, EXPIRED) as error:
            raise ConflictError(
                f"{where} does not allow it to the user {target.username}",
                hint="it needs the privileges VirtualMachine.Interact.PowerOff and PowerOn",
            ) from error
        except OSError as error:
            raise UnavailableError(f"{where} cannot be reached: {explain(error)}") from error
        except TROUBLE as error:
            raise ConflictError(f"{where} refuses: {explain(error)}") from error
        _log.info("VM's power", vm=name, vcenter=target.name, what=what)
        return done

    async def _find(self, vm: uuid.UUID) -> tuple[Target, str, str]:
        async with self._database.reading() as session:
            row = await session.get(VirtualMachine, vm)
            vcenter = await session.get(VCenter, row.vcenter_id) if row is not None else None
        if row is None or vcenter is None or row.removed_ns is not None:
            raise NotFoundError(
                f"there is no virtual machine {vm} in any vCenter", hint="see `understudy vms`"
            )
        return target_of(vcenter, self._vault), row.moid, row.name


def _state(session: Session, vm: Any) -> VmPowerState:
    return VmPowerState(str(session.properties(vm, "runtime.powerState")["runtime.powerState"]))


def _switch_off(session: Session, vm: Any) -> None:
    _switch(session, vm, VmPowerState.OFF, vm.PowerOffVM_Task)


def _switch_on(session: Session, vm: Any) -> None:
    _switch(session, vm, VmPowerState.ON, vm.PowerOnVM_Task)


def _switch(session: Session, vm: Any, wanted: VmPowerState, begin: Callable[[], Any]) -> None:
    if _state(session, vm) is wanted:
        return
    try:
        _finish(session, begin())
    except WRONG_STATE:
        if _state(session, vm) is not wanted:  # somebody else was quicker if it is
            raise
    found = _state(session, vm)
    if found is not wanted:
        raise ConflictError(f"the vCenter has switched it, and says that it is {found.value}")


def _finish(session: Session, task: Any) -> None:
    """Wait for a task's end; raises the fault that it ended with."""
    deadline = time.monotonic() + TASK_SECONDS_MAX
    while True:
        told = session.properties(task, "info.state", "info.error")
        state = str(told.get("info.state"))
        if state == "success":
            return
        if state == "error":
            fault = told.get("info.error")
            raise fault if isinstance(fault, Exception) else ConflictError("its task failed")
        if time.monotonic() > deadline:
            raise UnavailableError(f"its task does not end within {TASK_SECONDS_MAX:.0f} s")
        time.sleep(LOOK_SECONDS)

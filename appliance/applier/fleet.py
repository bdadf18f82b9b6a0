"""The machines that are applied: they come, change and go while the applier runs."""

import asyncio
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import structlog

from appliance.applier.machine import MachineApplier
from appliance.applier.removal import check_removable, drop_cached, remove_store
from appliance.applier.settled import settled
from appliance.applier.shared import Shared
from appliance.applier.target import Target
from replication.errors import ConflictError, ReplicationError

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Running:
    applier: MachineApplier
    task: "asyncio.Task[None]"


class Fleet:
    """Runs a MachineApplier for each target. ``follow`` is called by one task alone."""

    def __init__(self, shared: Shared, tasks: asyncio.TaskGroup) -> None:
        self._shared = shared
        self._tasks = tasks
        self._running: dict[uuid.UUID, _Running] = {}
        self._removed: set[uuid.UUID] = set()
        self._refused: set[uuid.UUID] = set()

    @property
    def appliers(self) -> Mapping[uuid.UUID, MachineApplier]:
        return {machine: one.applier for machine, one in self._running.items()}

    @property
    def removed(self) -> frozenset[uuid.UUID]:
        """Machines whose points are deleted, as was asked for."""
        return frozenset(self._removed)

    @property
    def refused(self) -> frozenset[uuid.UUID]:
        """Machines whose points stay although they were to be deleted: one is held or locked."""
        return frozenset(self._refused)

    async def follow(
        self,
        targets: Iterable[Target],
        removed: Iterable[uuid.UUID] = (),
        holds: Collection[uuid.UUID] = (),
    ) -> None:
        """Apply these from now on. The points of a machine go only if it is in ``removed``, and if
        none of them is locked or held by one of ``holds``.

        A removal that fails is told in the health and tried again with the next call.
        """
        wanted = {target.id: target for target in targets}
        for machine in self._running.keys() - wanted.keys():
            await self._stop(machine)
        self._removed &= set(removed)
        for machine in self._refused - set(removed):
            self._shared.health.report(_removal(machine))
        self._refused &= set(removed)
        for machine in sorted(set(removed) - wanted.keys() - self._removed):
            await self._remove(machine, holds)
        for machine, target in wanted.items():
            running = self._running.get(machine)
            if running is not None and running.applier.target.data_key != target.data_key:
                await self._stop(machine)
                running = None
            if running is None:
                applier = MachineApplier(self._shared, target)
                task = self._tasks.create_task(applier.run(), name=applier.id_text)
                self._running[machine] = _Running(applier, task)
            else:
                running.applier.follow(target)

    async def drop_again(self, machines: Iterable[uuid.UUID]) -> None:
        """Drop what has come into the cache since these were removed."""
        for machine in sorted(machines):
            await drop_cached(self._shared.account, machine, self._shared.owner)

    async def stop(self) -> None:
        for machine in list(self._running):
            self._running[machine].task.cancel()
        for machine in list(self._running):
            await self._stop(machine)

    async def _stop(self, machine: uuid.UUID) -> None:
        running = self._running.pop(machine)
        running.task.cancel()
        await asyncio.wait([running.task])
        running.applier.leave()

    async def _remove(self, machine: uuid.UUID, holds: Collection[uuid.UUID]) -> None:
        root = self._shared.config.store
        self._refused.discard(machine)
        try:
            await settled(check_removable, root, machine, holds)
            await drop_cached(self._shared.account, machine, self._shared.owner)
            await settled(remove_store, root, machine, holds)
        except ReplicationError as error:
            if isinstance(error, ConflictError):
                self._refused.add(machine)
            self._shared.health.report(_removal(machine), warning=str(error))
            return
        self._shared.health.report(_removal(machine))
        self._removed.add(machine)
        _log.info("removed", machine=str(machine))


def _removal(machine: uuid.UUID) -> str:
    """The part of the health that tells of it."""
    return f"removal of {machine}"

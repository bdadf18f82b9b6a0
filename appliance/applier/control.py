"""The applier under a config server: which machines it applies, and what it says of them.

Without a config server, from static configuration, none of this runs. While the config server is
away, what it said last goes on to hold, also over a restart; a machine whose data key is not here
yet waits for it. Points are deleted for machines that an assignment names in ``removed`` and for no
others: one that is not named at all is left alone. Holds that are not named any more end, but for
locks; an assignment of an older memory ends none.

Source: docs/CONTROL.md §4, §5.
"""

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Mapping

from appliance.applier.config import ApplierConfig
from appliance.applier.fleet import Fleet
from appliance.applier.holding import Wish
from appliance.applier.key_renewal import KeyRenewal
from appliance.applier.point_lists import PointTeller, machines_with_points
from appliance.applier.reporting import Reporter
from appliance.applier.retention import RETENTION_SECONDS_MAX, RetentionPolicy
from appliance.applier.target import Target
from daemon.control_client import ControlClient
from daemon.data_key import read_data_key
from daemon.service import Health, Service
from replication.control.assignment import AppliedMachine, ApplierAssignment
from replication.control.recovery import Hold
from replication.control.report import ApplierReport
from replication.errors import ConfigError, ReplicationError

RETRY_SECONDS = 5.0
"""Between two attempts to fetch a data key, or to remove a store, and two looks at the keys."""

DROP_AGAIN_SECONDS = 10.0
"""Between two looks at what has come into the cache for machines whose points are deleted: their
process server may not have heard of it yet.
"""

REFUSED_AGAIN_SECONDS = 10.0
"""Between two attempts to remove points that are locked: nobody tells when a lock is over."""

FETCHES_MAX = 2
"""Data keys that are asked for at once."""


def static_targets(config: ApplierConfig) -> list[Target]:
    """The machines of the configuration; ConfigError when a data key cannot be used."""
    return [
        Target(
            machine.id,
            machine.name,
            config.retention,
            read_data_key(machine.data_key_file),
            machine.data_key_file,
        )
        for machine in config.machines
    ]


async def follow(
    control: ControlClient[ApplierAssignment], fleet: Fleet, config: ApplierConfig, service: Service
) -> None:
    """Do as the config server says, and tell it how it goes, until ``service.stop``."""
    reporter = Reporter(config.store, fleet, service.health)
    teller = PointTeller(
        control, config.store, lambda: _machines(config, control), config.points_seconds
    )
    orders = _Orders(control, fleet, config, service.health)

    async def report() -> ApplierReport:
        return await reporter.report(control.assignment)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(control.run(report), name="control")
        ending = [
            tasks.create_task(orders.carry_out(), name="orders"),
            tasks.create_task(teller.run(), name="lists of points"),
        ]
        async for assignment in control.assignments():
            orders.take(assignment, is_older=control.is_older_memory)
        for task in ending:
            task.cancel()


def _machines(config: ApplierConfig, control: ControlClient[ApplierAssignment]) -> list[uuid.UUID]:
    """Machines that the config server knows to be here, and of which there is something."""
    found = control.assignment
    known = {*found.removed, *(machine.id for machine in found.machines)} if found else set()
    return machines_with_points(config.store, known)


class _Orders:
    """Carries out the newest assignment, again and again until all of it is done."""

    def __init__(
        self,
        control: ControlClient[ApplierAssignment],
        fleet: Fleet,
        config: ApplierConfig,
        health: Health,
    ) -> None:
        self._control = control
        self._fleet = fleet
        self._config = config
        self._health = health
        self._newest: ApplierAssignment | None = None
        self._is_older = False
        self._news = asyncio.Event()
        self._waiting: set[str] = set()
        self._fetches = asyncio.Semaphore(FETCHES_MAX)
        self._keys = KeyRenewal(control, fleet)

    def take(self, assignment: ApplierAssignment, *, is_older: bool) -> None:
        """``is_older``: it is of an older memory."""
        self._newest = assignment
        self._is_older = is_older
        self._news.set()

    async def carry_out(self) -> None:
        """Until cancelled."""
        done = True
        drop_at = look_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._news.wait()
            if self._newest is None:
                continue
            new_keys = await self._keys.renew(self._newest.version)
            over = bool(self._fleet.refused) and time.monotonic() >= look_at  # a lock, perhaps
            if self._news.is_set() or new_keys or not done or over:
                self._news.clear()
                done = await self._follow(self._newest, new_keys)
                look_at = time.monotonic() + REFUSED_AGAIN_SECONDS
            if time.monotonic() >= drop_at:
                drop_at = time.monotonic() + DROP_AGAIN_SECONDS
                await self._fleet.drop_again(self._fleet.removed)

    async def _follow(
        self, assignment: ApplierAssignment, new_keys: Mapping[uuid.UUID, bytes]
    ) -> bool:
        """Whether all of it is done. Machines whose keys are here do not wait for the others."""
        removed = set(assignment.removed) - {machine.id for machine in assignment.machines}
        keys = {
            machine.id: new_keys.get(machine.id) or self._kept_key(machine.id)
            for machine in assignment.machines
        }
        left = self._fleet.removed - removed - keys.keys()
        await self._fleet.drop_again(left)  # nobody looks at them any more
        holds = {hold.id for hold in assignment.holds}
        await self._fleet.follow(self._targets(assignment, keys), removed, holds)
        missing = [machine for machine in assignment.machines if keys[machine.id] is None]
        if missing:
            fetched = await asyncio.gather(*(self._fetch_key(machine) for machine in missing))
            keys |= {machine.id: key for machine, key in zip(missing, fetched, strict=True)}
            await self._fleet.follow(self._targets(assignment, keys), removed, holds)
        without_key = {_part(one) for one in assignment.machines if keys[one.id] is None}
        for part in self._waiting - without_key:
            self._health.report(part)
        self._waiting = without_key
        for machine in removed & self._fleet.removed:
            await asyncio.to_thread(self._control.forget_data_key, machine)
        self._control.report_now()
        return not without_key and removed <= self._fleet.removed | self._fleet.refused

    def _kept_key(self, machine: uuid.UUID) -> bytes | None:
        """The data key, if it is here."""
        running = self._fleet.appliers.get(machine)
        if running is not None:
            return running.target.data_key
        path = self._control.data_key_file(machine)
        with contextlib.suppress(ConfigError):  # fetching says what is wrong with it
            return read_data_key(path) if os.path.exists(path) else None
        return None

    async def _fetch_key(self, machine: AppliedMachine) -> bytes | None:
        async with self._fetches:
            try:
                return await self._control.data_key(machine.id)
            except ReplicationError as error:
                told = f"no data key, so nothing of it is applied: {error}"
                self._health.report(_part(machine), warning=told)
                return None

    def _targets(
        self, assignment: ApplierAssignment, keys: Mapping[uuid.UUID, bytes | None]
    ) -> list[Target]:
        holds: dict[uuid.UUID, list[Hold]] = {}
        for hold in assignment.holds:
            holds.setdefault(hold.machine, []).append(hold)
        return [
            self._target(machine, key, holds.get(machine.id, ()))
            for machine in assignment.machines
            if (key := keys[machine.id]) is not None
        ]

    def _target(self, machine: AppliedMachine, key: bytes, holds: Iterable[Hold]) -> Target:
        return Target(
            id=machine.id,
            name=machine.name or str(machine.id),
            retention=policy_of(machine, self._config.retention),
            data_key=key,
            key_source=self._control.data_key_file(machine.id),
            apply=machine.apply,
            keep=machine.keep,
            wish=Wish(tuple(holds), may_end=not self._is_older),
        )


def policy_of(machine: AppliedMachine, base: RetentionPolicy) -> RetentionPolicy:
    """What the assignment says; what it does not say is as the configuration has it."""
    return RetentionPolicy(
        retention_seconds=min(machine.retention_seconds, RETENTION_SECONDS_MAX),
        all_points_seconds=base.all_points_seconds,
        crash_frequency_seconds=machine.crash_frequency_seconds,
    )


def _part(machine: AppliedMachine) -> str:
    return f"data key of {machine.name or machine.id}"

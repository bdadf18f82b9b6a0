"""The applier under a config server: which machines it applies, and what it says of them.

Without a config server, from static configuration, none of this runs. While the config server is
away, what it said last goes on to hold, also over a restart; a machine whose data key is not here
yet waits for it. Points are deleted for machines that an assignment names in ``removed`` and for no
others: one that is not named at all is left alone.

Source: docs/CONTROL.md §4, §5.
"""

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Mapping

from appliance.applier.config import ApplierConfig
from appliance.applier.fleet import Fleet
from appliance.applier.key_renewal import KeyRenewal
from appliance.applier.reporting import Reporter
from appliance.applier.retention import RETENTION_SECONDS_MAX, RetentionPolicy
from appliance.applier.target import Target
from daemon.control_client import ControlClient
from daemon.data_key import read_data_key
from daemon.service import Health, Service
from replication.control.assignment import AppliedMachine, ApplierAssignment
from replication.control.report import ApplierReport
from replication.errors import ConfigError, ReplicationError

RETRY_SECONDS = 5.0
"""Between two attempts to fetch a data key, or to remove a store, and two looks at the keys."""

DROP_AGAIN_SECONDS = 10.0
"""Between two looks at what has come into the cache for machines whose points are deleted: their
process server may not have heard of it yet.
"""

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
    orders = _Orders(control, fleet, config, service.health)

    async def report() -> ApplierReport:
        return await reporter.report(control.version)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(control.run(report), name="control")
        carrying_out = tasks.create_task(orders.carry_out(), name="orders")
        async for assignment in control.assignments():
            orders.take(assignment)
        carrying_out.cancel()


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
        self._news = asyncio.Event()
        self._waiting: set[str] = set()
        self._fetches = asyncio.Semaphore(FETCHES_MAX)
        self._keys = KeyRenewal(control, fleet)

    def take(self, assignment: ApplierAssignment) -> None:
        self._newest = assignment
        self._news.set()

    async def carry_out(self) -> None:
        """Until cancelled."""
        done = True
        drop_at = 0.0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_SECONDS):
                    await self._news.wait()
            if self._newest is None:
                continue
            new_keys = await self._keys.renew(self._newest.version)
            if self._news.is_set() or new_keys or not done:
                self._news.clear()
                done = await self._follow(self._newest, new_keys)
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
        await self._fleet.follow(self._targets(assignment, keys), removed)
        missing = [machine for machine in assignment.machines if keys[machine.id] is None]
        if missing:
            fetched = await asyncio.gather(*(self._fetch_key(machine) for machine in missing))
            keys |= {machine.id: key for machine, key in zip(missing, fetched, strict=True)}
            await self._fleet.follow(self._targets(assignment, keys), removed)
        without_key = {_part(one) for one in assignment.machines if keys[one.id] is None}
        for part in self._waiting - without_key:
            self._health.report(part)
        self._waiting = without_key
        for machine in removed & self._fleet.removed:
            await asyncio.to_thread(self._control.forget_data_key, machine)
        self._control.report_now()
        return not without_key and removed <= self._fleet.removed

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
        return [
            self._target(machine, key)
            for machine in assignment.machines
            if (key := keys[machine.id]) is not None
        ]

    def _target(self, machine: AppliedMachine, key: bytes) -> Target:
        return Target(
            id=machine.id,
            name=machine.name or str(machine.id),
            retention=policy_of(machine, self._config.retention),
            data_key=key,
            key_source=self._control.data_key_file(machine.id),
            apply=machine.apply,
            keep=machine.keep,
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

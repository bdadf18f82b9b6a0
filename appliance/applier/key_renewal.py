"""A machine's data key that changed at the config server while an old one is kept here.

What waits for the machine is then opened by none. The key is fetched again, and takes the place of
the old one only if it opens what that did not: whoever can merely write to the cache, or a config
server that has another key by mistake, takes no key away that is right.

Source: docs/CONTROL.md §3.
"""

import asyncio
import uuid

from appliance.applier.fleet import Fleet
from daemon.control_client import ControlClient
from replication.control.assignment import ApplierAssignment
from replication.errors import ReplicationError


class KeyRenewal:
    """Fetches a key again once for each machine and version of the assignment: protecting a
    machine anew counts the version up, and what is forged in the cache makes no flood of requests.
    """

    def __init__(self, control: ControlClient[ApplierAssignment], fleet: Fleet) -> None:
        self._control = control
        self._fleet = fleet
        self._version = -1
        self._asked: set[uuid.UUID] = set()

    async def renew(self, version: int) -> dict[uuid.UUID, bytes]:
        """Keys that are on the disk now in the place of others, by machine."""
        if version != self._version:
            self._version = version
            self._asked.clear()
        new = {}
        for machine, applier in self._fleet.appliers.items():
            if applier.inbox.unopened is None or machine in self._asked:
                continue
            self._asked.add(machine)
            try:
                key = await self._control.fetch_data_key(machine)
                if key != applier.target.data_key and await applier.inbox.is_opened_by(key):
                    await asyncio.to_thread(self._control.keep_data_key, machine, key)
                    new[machine] = key
            except ReplicationError as error:
                # The machine's health says already that its key does not fit.
                if error.retryable:
                    self._asked.discard(machine)
        return new

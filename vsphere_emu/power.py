"""Guests that follow their VM's power: one task each, which brings about the newest wish."""

import asyncio
from collections.abc import Mapping

import structlog

from replication.errors import ReplicationError
from vsphere_emu.guest import Guest

RETRY_SECONDS = 5.0

_log = structlog.get_logger()


class PowerSwitch:
    """One guest's switch. ``trouble``: why the guest is not as it should be; empty when it is."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.trouble = ""
        self._wanted: bool | None = None
        self._news = asyncio.Event()

    def is_on(self) -> bool:
        """What the VM is: as it was wished last, else as the guest is."""
        return self.guest.status().is_powered_on if self._wanted is None else self._wanted

    def turn(self, *, on: bool) -> None:
        """Wish for it; only the newest wish counts."""
        self._wanted = on
        self._news.set()

    async def follow(self) -> None:
        """Bring wishes about, for ever. One that fails is tried again every RETRY_SECONDS."""
        while True:
            try:
                async with asyncio.timeout(RETRY_SECONDS if self.trouble else None):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            wanted = self._wanted
            if wanted is None:
                continue
            try:
                await asyncio.to_thread(self._bring_about, wanted)
            except ReplicationError as error:
                self.trouble = str(error)
                continue
            self.trouble = ""
            _log.info("guest follows its VM", guest=self.guest.config.name, on=wanted)

    def _bring_about(self, wanted: bool) -> None:
        if wanted:
            self.guest.power_on()
            self.guest.start_workload()
        else:
            self.guest.power_off()


def troubles(switches: Mapping[str, PowerSwitch]) -> str:
    """What is wrong with any of them, in one line; empty when nothing is."""
    return "; ".join(f"{name}: {one.trouble}" for name, one in switches.items() if one.trouble)

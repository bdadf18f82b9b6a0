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
        self._is_cut = False
        self._news = asyncio.Event()

    def is_on(self) -> bool:
        """What the VM is: as it was wished last, else as the guest is."""
        return self.guest.status().is_powered_on if self._wanted is None else self._wanted

    def turn(self, *, on: bool, cut: bool = False) -> None:
        """Wish for it; only the newest wish counts. cut: off as by a power cut."""
        self._wanted, self._is_cut = on, cut
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
            wanted, is_cut = self._wanted, self._is_cut
            if wanted is None:
                continue
            try:
                await asyncio.to_thread(self._bring_about, on=wanted, cut=is_cut)
            except ReplicationError as error:
                self.trouble = str(error)
                continue
            self.trouble = ""
            _log.info("guest follows its VM", guest=self.guest.config.name, on=wanted)

    def _bring_about(self, *, on: bool, cut: bool) -> None:
        if on:
            self.guest.power_on()
            self.guest.start_workload()
        elif cut:
            self.guest.cut_power()
        else:
            self.guest.power_off()


def troubles(switches: Mapping[str, PowerSwitch]) -> str:
    """What is wrong with any of them, in one line; empty when nothing is."""
    return "; ".join(f"{name}: {one.trouble}" for name, one in switches.items() if one.trouble)

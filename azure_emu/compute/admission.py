"""Who may run: memory for all VMs together, and so many boots at once, first come first served."""

import asyncio
import uuid
from dataclasses import dataclass

from replication.errors import InputError


@dataclass(slots=True)
class _Running:
    memory_bytes: int
    booting: bool


class Admission:
    """Counts what runs. Waiters are at most as many as there are VMs (VMS_MAX)."""

    def __init__(self, memory_bytes_max: int, boots_max: int) -> None:
        self._memory_bytes_max = memory_bytes_max
        self._boots_max = boots_max
        self._running: dict[uuid.UUID, _Running] = {}
        self._waiting: list[tuple[uuid.UUID, int, asyncio.Future[None]]] = []

    async def admit(self, vm: uuid.UUID, memory_bytes: int) -> None:
        """Wait until the VM may boot. Raises InputError when it never may."""
        if memory_bytes > self._memory_bytes_max:
            raise InputError(
                f"the VM needs {memory_bytes >> 20} MiB, all VMs together may have"
                f" {self._memory_bytes_max >> 20}",
                hint="order less memory, or give the compute node a larger memory_bytes_max",
            )
        self.release(vm)
        entry = (vm, memory_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self._let_in()
        try:
            await entry[2]
        except asyncio.CancelledError:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                self.release(vm)
            self._let_in()
            raise

    def count(self, vm: uuid.UUID, memory_bytes: int, *, booting: bool) -> None:
        """It runs, whether there is room or not. When it boots no more, another one may."""
        self._running[vm] = _Running(memory_bytes, booting)
        self._let_in()

    def release(self, vm: uuid.UUID) -> None:
        """It runs no more; fine to say again."""
        if self._running.pop(vm, None) is not None:
            self._let_in()

    def _let_in(self) -> None:
        while self._waiting:
            vm, memory_bytes, admitted = self._waiting[0]
            if admitted.cancelled():
                self._waiting.pop(0)
                continue
            used = sum(one.memory_bytes for one in self._running.values())
            booting = sum(one.booting for one in self._running.values())
            if used + memory_bytes > self._memory_bytes_max or booting >= self._boots_max:
                return
            self._waiting.pop(0)
            self._running[vm] = _Running(memory_bytes, booting=True)
            admitted.set_result(None)

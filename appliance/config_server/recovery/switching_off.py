"""Switching sources off, of a planned failover while nothing is written.

Source: docs/RECOVERY.md §4.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog

from appliance.config_server.nodes.assignments import FINAL_SECONDS_MAX
from appliance.config_server.protection.workflow import Done, Outside, Verdict
from appliance.config_server.recovery.decisions import Bad
from appliance.config_server.recovery.parts import add_note, fail_part, refuse_failed
from appliance.config_server.recovery.ports import PowerPort
from appliance.config_server.recovery.run import FailoverKind
from appliance.config_server.recovery.scene import Part, RecoveryScene
from replication.control.report import MachineReport
from replication.errors import ReplicationError

POWER_OFF_SECONDS_MAX = 120.0
POWERED_OFF_AT_ONCE_MAX = 16
FINAL_FRESH_SECONDS = 10.0
"""An agent that holds a final changeset says so every second. One that was heard so long before the
power-off at last has perhaps ended, and what it froze is thawed.
"""

NOT_OFF = -1
"""Of an unplanned failover's `powered_off_ns`: it was tried, and went wrong."""

THAW_HINT = "its agent lets writes go on; see that it and its network are well, then ask again"
_THAWED = f"an agent lets writes go on after {FINAL_SECONDS_MAX:.0f} s"
_SECOND_NS = 10**9
_FINAL_NS = int(FINAL_SECONDS_MAX * _SECOND_NS)
_FRESH_NS = int(FINAL_FRESH_SECONDS * _SECOND_NS)


@dataclass(frozen=True, slots=True)
class _Source:
    """A source that is to be switched off.

    until_ns: when that is of no use any more, since its agent lets writes go on; none: never.
    told_ns:  when its vCenter was told before, 0: never.
    """

    name: str
    vm: uuid.UUID | None
    until_ns: int | None
    told_ns: int


@dataclass(frozen=True, slots=True)
class _Off:
    """What came of switching a source off.

    why:              why it is not off; empty when it is.
    began_ns, end_ns: when its vCenter was told to, and when that had done it.
    told_ns:          when it was told last, 0: never.
    """

    why: str
    began_ns: int
    end_ns: int
    told_ns: int


@dataclass(frozen=True, slots=True)
class SwitchingOff:
    """The step of a failover that does it."""

    power: PowerPort

    async def shut_down(self, scene: RecoveryScene) -> Verdict:
        """Switch the sources off; of an unplanned failover those that can be.

        That it is begun is written down before, since it may be done although the job ends.
        """
        await _fail_thawed(scene)
        await refuse_failed(scene)
        todo = {
            part.failover.id: _source_of(part)
            for part in scene.active()
            if part.failover.powered_off_ns == 0
            and (part.kind is FailoverKind.PLANNED or part.options.shut_down)
        }
        if not todo:
            return Done(_shut_down_note(scene))
        for part in scene.active():
            if part.failover.id in todo and part.machine.vm_id is not None:
                part.failover.power_off_ns = scene.now_ns
        names = ", ".join(source.name for source in todo.values())
        note = f"switches off {names}; {POWER_OFF_SECONDS_MAX:.0f} s at most for each"
        return Outside(note, self._off_all(todo, scene.now_ns))

    def _off_all(
        self, todo: Mapping[uuid.UUID, _Source], now_ns: int
    ) -> Callable[[], Awaitable[Callable[[RecoveryScene], Awaitable[None]]]]:
        since_ns = time.monotonic_ns()

        def clock() -> int:
            return now_ns + time.monotonic_ns() - since_ns

        async def do() -> Callable[[RecoveryScene], Awaitable[None]]:
            free = asyncio.Semaphore(POWERED_OFF_AT_ONCE_MAX)

            async def one(source: _Source) -> _Off:
                async with free:
                    began_ns = clock()
                    if source.until_ns is not None and began_ns > source.until_ns:
                        # Its turn came too late: it writes again, and is better left on.
                        return _Off(_THAWED, began_ns, began_ns, source.told_ns)
                    why = await self._off(source.vm)
                    return _Off(why, began_ns, clock(), began_ns if source.vm else 0)

            told = await asyncio.gather(*map(one, todo.values()))
            outcomes = dict(zip(todo, told, strict=True))

            async def record(scene: RecoveryScene) -> None:
                await _record_off(scene, outcomes)

            return record

        return do

    async def _off(self, vm: uuid.UUID | None) -> str:
        """Why it is not off; empty when it is."""
        if vm is None:
            return "it is in no vCenter's inventory"
        try:
            async with asyncio.timeout(POWER_OFF_SECONDS_MAX):
                await self.power.power_off(vm)
        except TimeoutError:
            return f"its vCenter did not do it within {POWER_OFF_SECONDS_MAX:.0f} s"
        except ReplicationError as error:
            return str(error.args[0])
        except Exception as error:  # noqa: BLE001 - told by what failed, and by the log
            # Else the job would be begun again without end, while the source stays frozen.
            structlog.get_logger().exception("a source cannot be switched off", vm=str(vm))
            return f"a defect: {error!r}"
        return ""


def _source_of(part: Part) -> _Source:
    row, machine = part.failover, part.machine
    is_planned = part.kind is FailoverKind.PLANNED
    until_ns = row.final_ns + _FINAL_NS if is_planned else None
    return _Source(machine.name, machine.vm_id, until_ns, row.power_off_ns)


async def _fail_thawed(scene: RecoveryScene) -> None:
    """Sources that write again are not switched off for nothing."""
    for part in scene.active():
        if part.kind is not FailoverKind.PLANNED or part.failover.powered_off_ns:
            continue
        if why := await _why_not_held(scene, part, scene.now_ns, scene.now_ns):
            bad = Bad("not_off", f"the source is not switched off: {why}", THAW_HINT)
            await fail_part(scene, part, bad)
    await scene.session.flush()


async def _record_off(scene: RecoveryScene, outcomes: Mapping[uuid.UUID, _Off]) -> None:
    """Write down what is off. A source of a planned failover must be, before its agent thaws."""
    for part in scene.active():
        if part.failover.id not in outcomes:
            continue
        off = outcomes[part.failover.id]
        row, why = part.failover, off.why
        row.powered_off_ns = NOT_OFF if why else off.end_ns
        row.power_off_ns = off.told_ns
        if part.kind is not FailoverKind.PLANNED:
            if why:
                add_note(row, f"the source is not off: {why}")
            continue
        message = f"the source is not off: {why}"
        if not why:
            why = await _why_not_held(scene, part, off.began_ns, off.end_ns)
            message = f"the source was not off in time: {why}"
        if why:
            await fail_part(scene, part, Bad("not_off", message, THAW_HINT))


async def _why_not_held(scene: RecoveryScene, part: Part, began_ns: int, off_ns: int) -> str:
    """Why writes may have been acknowledged after the final changeset; empty where none was.

    The agent says so, was not heard when the power-off began (at ``began_ns``), or the source was
    on (until ``off_ns``) for longer than an agent stays frozen.
    """
    if off_ns - part.failover.final_ns > _FINAL_NS:
        return _THAWED
    heard = await scene.heard(part.machine.id)
    if heard is None or not isinstance(heard.report, MachineReport):
        return "its agent is not heard"
    if heard.report.final != part.failover.final:
        return "its agent had let writes go on before it was off"
    silent_ns = began_ns - heard.seen_ns
    if silent_ns > _FRESH_NS:
        return (
            f"its agent was last heard {silent_ns / _SECOND_NS:.0f} s before; if it has ended, "
            "writes went on"
        )
    return ""


def _shut_down_note(scene: RecoveryScene) -> str:
    """Those that could not be, and those that nobody tried."""
    untouched = [part.machine.name for part in scene.active() if part.failover.powered_off_ns <= 0]
    return f"still on, as far as is known: {', '.join(untouched)}" if untouched else ""

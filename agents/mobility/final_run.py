"""Carrying out an order for a final changeset, and holding it for as long as it is wanted.

One order at a time, in the place of ordinary changesets: the freeze begins in the capture, and ends
here, whatever happens. What can be mended by trying again, before anything is frozen, is tried
again by the replicator; all else settles the order, with the reason.
"""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from agents.mobility.changeset import ChangesetSender, Sent
from agents.mobility.config import AgentConfig
from agents.mobility.final_capture import FinalCapture, FinalHold, FinalRefusedError
from agents.mobility.final_order import FinalBook, FinalOrder
from agents.mobility.frame_builder import SegmentBuilder
from agents.mobility.freeze import Freezer, refuse_own
from agents.mobility.source import SourceDisk
from agents.mobility.stream_state import StreamStateFile
from daemon.service import Service
from replication.bookmark import Stamp
from replication.errors import ConfigError, ReplicationError
from replication.stream import StreamState

LOOK_SECONDS = 0.25
"""Between two looks whether it still holds, and is still wanted."""

TELL_SECONDS = 1.0
"""While it holds, the config server is told so as often: it goes by no old word."""

POLL_SECONDS = 2.0
PART = "final changeset"
TAKEN_BACK = "it was taken back"
ENDED = "replication was ended: the agent stops, or follows another assignment"


class Finale:
    """Carries out what ``book`` wants; ``carry_out`` is called while something is due.

    poll:  asks the process server where it is, and tells those who want to know.
    learn: tells them what it has said.
    """

    def __init__(
        self,
        config: AgentConfig,
        disks: Sequence[SourceDisk],
        *,
        state: StreamStateFile,
        freezer: Freezer,
        service: Service,
        sender: ChangesetSender,
        poll: Callable[[], Awaitable[StreamState]],
        learn: Callable[[StreamState], Awaitable[StreamState]],
        book: FinalBook,
    ) -> None:
        self._config = config
        self._disks = disks
        self._state = state
        self._freezer = freezer
        self._service = service
        self._sender = sender
        self._poll = poll
        self._learn = learn
        self._book = book
        self._made: FinalCapture | None = None

    @property
    def is_due(self) -> bool:
        """Whether there is an order that was not carried out yet."""
        return self._book.is_due

    async def begin(self) -> None:
        """The disks are here, so the machine may write again, whatever was said before."""
        await asyncio.to_thread(self._book.revoke, "the machine's disks have come back")

    async def carry_out(self) -> None:
        """Take a changeset for the order that is due; the final one if it holds all there is.

        Raises what an ordinary changeset raises, as long as nothing was frozen for the order.
        """
        order = self._book.wanted
        assert order is not None
        if refusal := self._why_impossible():
            return await self._fail(order, refusal)
        self._made = None
        reason = ENDED
        try:
            reason = await self._carry_out(order)
        except asyncio.CancelledError:
            reason = ENDED if self._held is not None else ""
            raise
        except FinalRefusedError as error:
            reason = str(error)
        except ReplicationError as error:
            if self._held is None:
                reason = ""
                raise
            reason = ENDED if self._service.stop.is_set() else str(error)
        finally:
            self._service.health.report(PART)
            try:
                if reason == ENDED and self._held is not None:
                    # Soon nothing is told any more: so before anything is written again.
                    await self._fail(order, reason)
                    await self._book.announce()
            finally:
                await self._let_go(reason)
            if reason:
                await self._fail(order, reason)
        return None

    @property
    def _held(self) -> FinalHold | None:
        return self._made.held if self._made is not None else None

    def _why_impossible(self) -> str:
        position = self._state.position
        if position.resync is not None or not position.seeded:
            return "the second site does not have the machine's whole state yet"
        mounts = [fs for disk in self._disks for fs in disk.file_systems()]
        tls = self._config.tls
        files = (tls.certificate, tls.key, tls.ca, self._config.data_key_file)
        try:
            # What it is told is written there: else it would not hear that it may thaw.
            refuse_own(mounts, sorted({os.path.dirname(path) for path in files}))
        except ConfigError as error:
            return str(error)
        return ""

    async def _carry_out(self, order: FinalOrder) -> str:
        """Why it does not hold any more; empty where it was no more than a part of a backlog."""
        log = structlog.get_logger()

        def capture(builder: SegmentBuilder, aborted: threading.Event) -> FinalCapture:
            app = self._config.app_consistency
            self._made = made = FinalCapture(
                disks=self._disks,
                state=self._state,
                freezer=self._freezer,
                builder=builder,
                config=self._config.capture,
                app=app if app.interval_seconds or app.pre or app.post else None,
                aborted=aborted,
                seconds_max=order.seconds_max,
                before_freeze=lambda: self._book.begin(order.number),
            )
            return made

        log.info("a final changeset was ordered", order=order.number)
        sending = asyncio.create_task(self._sender.send(capture), name="final changeset")
        try:
            reason = await self._watch(order, sending)
        finally:
            if not sending.done():
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
        if reason:
            return reason
        sent = sending.result()
        await self._learn(sent.told)
        hold = self._held
        if hold is None:
            return ""
        if reason := await asyncio.to_thread(hold.why_broken):
            return reason
        log.warning("final changeset is held", order=order.number, changeset=str(sent.stamp))
        self._service.health.report(
            PART, warning=f"nothing is written: the machine is being failed over ({sent.stamp})"
        )
        self._book.hold(sent.stamp, hold)
        return await self._keep(order, sent.stamp, hold)

    async def _watch(self, order: FinalOrder, sending: "asyncio.Task[Sent]") -> str:
        """Until it is sent; why it cannot be waited for any longer, empty if it is sent."""
        while True:
            await asyncio.wait({sending}, timeout=LOOK_SECONDS)
            if sending.done():
                return ""
            if not self._is_wanted(order):
                return TAKEN_BACK
            hold = self._held
            if hold is not None and (reason := await asyncio.to_thread(hold.why_broken)):
                return f"{reason}, before the process server had acknowledged the changeset"

    async def _keep(self, order: FinalOrder, stamp: Stamp, hold: FinalHold) -> str:
        """Hold it; why that has ended, empty where it holds for good: the disks are gone."""
        polling = asyncio.create_task(self._await_loss(stamp), name="final poll")
        stopping = asyncio.create_task(self._service.stop.wait(), name="final stop")
        told_at = time.monotonic()
        try:
            while True:
                if time.monotonic() - told_at >= TELL_SECONDS:
                    told_at = time.monotonic()
                    self._book.repeat()
                await asyncio.wait(
                    {polling, stopping}, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
                if stopping.done():
                    return ENDED
                if not self._is_wanted(order):
                    return TAKEN_BACK
                if polling.done():
                    return polling.result()
                if reason := await asyncio.to_thread(hold.why_broken):
                    why_not = await asyncio.to_thread(hold.part)
                    return f"{reason}; {why_not}" if why_not else ""
        finally:
            for task in (polling, stopping):
                task.cancel()
            await asyncio.gather(polling, stopping, return_exceptions=True)

    async def _await_loss(self, stamp: Stamp) -> str:
        """Until the process server says that it does not have the changeset any more."""
        while True:
            await asyncio.sleep(POLL_SECONDS)
            stream = await self._poll()
            if stream.committed < stamp or stream.watermark.lost:
                return "what was sent has been lost on its way to the second site"

    def _is_wanted(self, order: FinalOrder) -> bool:
        wanted = self._book.wanted
        return wanted is not None and wanted.number == order.number

    async def _let_go(self, reason: str) -> None:
        hold = self._held
        if hold is None:
            return
        result = await asyncio.shield(asyncio.to_thread(hold.release, reason))
        if result is not None:
            structlog.get_logger().warning(
                "file systems are thawed after a final changeset", seconds=round(hold.seconds, 3)
            )

    async def _fail(self, order: FinalOrder, reason: str) -> None:
        if not self._is_wanted(order):
            return  # nobody wants to know any more
        structlog.get_logger().warning("no final changeset", order=order.number, reason=reason)
        await asyncio.to_thread(self._book.fail, order.number, reason)

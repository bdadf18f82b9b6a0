"""One changeset on its way: a capture in a worker thread feeds a few requests in flight.

A segment is handed over when a sender is free for it, so a capture waits when the network does and
memory stays constant: as many segments as are in flight, and the one being built. Whichever side
fails first ends the other.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor
from typing import TypeVar

from agents.mobility.frame_builder import Segment, SegmentBuilder
from agents.mobility.stream_client import StreamClient
from replication.envelope import AttemptSealer
from replication.errors import CaptureError

DRAIN_SECONDS = 0.01
"""How often hand-overs are let pass while a capture ends."""

T = TypeVar("T")


async def upload(
    client: StreamClient,
    sealer: AttemptSealer,
    executor: Executor,
    capture: Callable[[SegmentBuilder], T],
    aborted: threading.Event,
    *,
    segment_bytes: int,
    in_flight_max: int,
) -> tuple[T, SegmentBuilder]:
    """Run ``capture`` in a thread and put all segments that it builds; return when all are stored.

    aborted: set when the capture must end early: it raises CaptureError then.
    """
    loop = asyncio.get_running_loop()
    free = asyncio.Semaphore(in_flight_max)
    queue: asyncio.Queue[Segment | None] = asyncio.Queue()

    async def hand_over(segment: Segment) -> None:
        await free.acquire()
        queue.put_nowait(segment)

    def submit(segment: Segment) -> None:
        if aborted.is_set():
            raise CaptureError("the changeset was given up")
        try:
            asyncio.run_coroutine_threadsafe(hand_over(segment), loop).result()
        except CancelledError as error:
            raise CaptureError("the changeset was given up") from error

    builder = SegmentBuilder(sealer, executor, submit, segment_bytes=segment_bytes)

    def work() -> T:
        result = capture(builder)
        builder.finish()
        return result

    async def send() -> None:
        while (segment := await queue.get()) is not None:
            try:
                await client.put_segment(sealer.stamp, sealer.attempt, segment)
            finally:
                del segment  # not kept while waiting for the next
                free.release()

    senders = [asyncio.create_task(send(), name=f"sender-{n}") for n in range(in_flight_max)]
    working = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.wait([working, *senders], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            result = working.result()
            for _ in senders:
                queue.put_nowait(None)
            await asyncio.gather(*senders)
            return result, builder
        for sender in senders:
            if sender.done():
                sender.result()
        raise CaptureError("the changeset was given up")
    finally:
        aborted.set()
        for sender in senders:
            sender.cancel()
        await _until_ended(working, free)
        await asyncio.gather(*senders, return_exceptions=True)


async def _until_ended(working: "asyncio.Future[T]", free: asyncio.Semaphore) -> None:
    """Let the capture's hand-overs pass until it notices that it is to end, and has ended.

    Also when the task is cancelled meanwhile, however often: a thread that was left behind would
    use the disks and the state together with what comes next, or wait for a loop that is gone.
    """
    cancelled = None
    while not working.done():
        free.release()
        try:
            await asyncio.wait([working], timeout=DRAIN_SECONDS)
        except asyncio.CancelledError as error:
            cancelled = error
    if not working.cancelled():
        working.exception()  # seen: what ends the upload is told, not what follows from it
    if cancelled:
        raise cancelled

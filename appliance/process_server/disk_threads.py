"""Threads for what blocks on the spool's disk: few, so that memory and queues stay small."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

DISK_THREADS_MAX = 6

P = ParamSpec("P")
R = TypeVar("R")


class DiskThreads:
    """Runs blocking calls; a call that has begun ends before its caller is cancelled."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(DISK_THREADS_MAX, thread_name_prefix="spool")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._executor.shutdown()

    def start(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> "asyncio.Future[R]":
        """Begin ``call``; the caller must await it, also when cancelled."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self._executor, lambda: call(*args, **kwargs))

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run ``call`` to its end, whatever happens to the caller."""
        return await settle(self.start(call, *args, **kwargs))


async def settle(future: "asyncio.Future[R]") -> R:
    """Await ``future`` to its end; a cancellation that comes meanwhile is passed on after it."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()
        raise cancelled
    return future.result()

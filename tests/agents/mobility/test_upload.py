"""A capture's thread and its requests: whichever side fails, the other one ends."""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agents.mobility import stream_client
from agents.mobility.config import SendConfig
from agents.mobility.frame_builder import SEALING_COUNT_MAX, FrameContent, SegmentBuilder
from agents.mobility.stream_client import StreamClient
from agents.mobility.upload import upload
from daemon.tls import TlsFiles
from replication.bookmark import Stamp
from replication.envelope import AttemptKey, AttemptSealer
from replication.errors import CaptureError, OutOfOrderError, PeerError, StorageError
from replication.extent import Extent
from tests.agents.mobility.replica import opened_frames
from tests.agents.mobility.script_server import Authority, ScriptServer, refuse, running

MACHINE = uuid.UUID(int=9)
KEY = bytes(32)
NOISE = os.urandom(1 << 20)
IN_FLIGHT_MAX = 2
SEGMENT_BYTES = 2 << 20


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


class Rig:
    """An upload whose capture is ``frames`` frames of noise."""

    def __init__(self, server: ScriptServer, tls: TlsFiles, executor: ThreadPoolExecutor) -> None:
        self.server, self._tls, self._executor = server, tls, executor
        self.stopping = asyncio.Event()
        self.aborted = threading.Event()
        self.in_thread = threading.Event()
        self.builder: SegmentBuilder | None = None
        self.added = 0
        self.sealer = AttemptSealer(KEY, MACHINE, Stamp(1, 1))

    def capture(
        self, frames: int, then: Callable[[], object] = lambda: None
    ) -> Callable[[SegmentBuilder], int]:
        def run(builder: SegmentBuilder) -> int:
            self.builder = builder
            self.in_thread.set()
            try:
                for number in range(frames):
                    extent = Extent(256 * number, 256)
                    builder.add(FrameContent(0, [extent], [NOISE], len(NOISE)))
                    self.added += 1
                then()
                return frames
            finally:
                self.in_thread.clear()

        return run

    async def upload(self, capture: Callable[[SegmentBuilder], int]) -> tuple[int, SegmentBuilder]:
        config = SendConfig(backoff_seconds_max=0.05, request_seconds_max=10)
        async with StreamClient(
            self.server.origin,
            MACHINE,
            self._tls,
            config,
            stopping=self.stopping,
            on_trouble=lambda trouble: None,
        ) as client:
            return await upload(
                client,
                self.sealer,
                self._executor,
                capture,
                self.aborted,
                segment_bytes=SEGMENT_BYTES,
                in_flight_max=IN_FLIGHT_MAX,
            )


@pytest.fixture
async def rig(
    tmp_path: Path, executor: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Rig]:
    monkeypatch.setattr(stream_client, "BACKOFF_SECONDS_MIN", 0.01)
    authority = Authority(tmp_path, "ca")
    async with running(authority.issue("localhost")) as server:
        yield Rig(server, authority.issue(str(MACHINE)), executor)


async def test_all_segments_are_stored_before_it_returns(rig: Rig) -> None:
    rig.server.script = [refuse(503), refuse(429)]
    frames, builder = await rig.upload(rig.capture(11))
    assert frames == 11
    assert len(rig.server.stored) == len(builder.entries) == 6
    key = AttemptKey(KEY, MACHINE, rig.sealer.stamp, rig.sealer.attempt)
    numbers = []
    for path in sorted(rig.server.stored, key=lambda path: int(path.rsplit("/", 1)[1])):
        numbers += [frame.header.number for frame, _ in opened_frames(key, rig.server.stored[path])]
    assert numbers == list(range(11))


async def test_empty_changeset_has_no_segments(rig: Rig) -> None:
    _, builder = await rig.upload(rig.capture(0))
    assert builder.entries == []
    assert rig.server.paths == []


async def test_memory_stays_bounded_while_the_process_server_is_full(rig: Rig) -> None:
    rig.server.always = refuse(429)
    uploading = asyncio.create_task(rig.upload(rig.capture(200)))
    await rig.server.arrived.wait()
    seen = -1
    while seen != rig.added:  # until the capture stands still
        seen = rig.added
        await asyncio.sleep(0.4)
    assert rig.builder
    segments = IN_FLIGHT_MAX + 2  # one is handed over, one waits to be
    assert len(rig.builder.entries) <= segments
    assert rig.added <= segments * 2 + SEALING_COUNT_MAX
    rig.server.always = None
    frames, builder = await uploading
    assert (frames, len(builder.entries)) == (200, len(rig.server.stored))


@pytest.mark.parametrize(("status", "error"), [(409, OutOfOrderError), (403, PeerError)])
async def test_refusal_ends_a_capture_that_waits_to_hand_over(
    rig: Rig, status: int, error: type[Exception]
) -> None:
    for round_ in range(15):
        rig.server.script = [refuse(503)] * (round_ % 4)
        rig.server.always = refuse(status, read=round_ % 2 == 0)
        rig.aborted.clear()
        with pytest.raises(error):
            await asyncio.wait_for(rig.upload(rig.capture(30)), 20)
        assert not rig.in_thread.is_set()
        assert rig.aborted.is_set()


async def test_refusal_of_the_last_segment_is_told(rig: Rig) -> None:
    rig.server.script = [rig.server.store, rig.server.store, refuse(403)]
    with pytest.raises(PeerError):
        await asyncio.wait_for(rig.upload(rig.capture(5)), 20)


async def test_capture_that_fails_ends_the_requests(rig: Rig) -> None:
    def fail() -> None:
        raise StorageError("a bad sector")

    rig.server.always = refuse(429, retry_after="60")
    with pytest.raises(StorageError, match="bad sector"):
        await asyncio.wait_for(rig.upload(rig.capture(3, fail)), 10)


async def test_capture_that_hears_of_its_end_late_is_waited_for(rig: Rig) -> None:
    """What comes next must not share the disks with it."""
    rig.server.always = refuse(403)
    ended = []

    def late(builder: SegmentBuilder) -> int:
        try:
            return rig.capture(30)(builder)
        finally:
            time.sleep(0.3)
            ended.append(1)

    with pytest.raises(PeerError):
        await asyncio.wait_for(rig.upload(late), 10)
    assert ended == [1]


@pytest.mark.parametrize("times", [1, 2, 5])
async def test_cancelled_upload_leaves_no_thread_behind(rig: Rig, times: int) -> None:
    rig.server.always = refuse(429, retry_after="60")
    uploading = asyncio.create_task(rig.upload(rig.capture(100)))
    await rig.server.arrived.wait()
    await asyncio.sleep(0.1)
    for _ in range(times):
        uploading.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(uploading, 10)
    assert not rig.in_thread.is_set()


async def test_stop_ends_it_though_the_process_server_is_full(rig: Rig) -> None:
    rig.server.always = refuse(429, retry_after="60")
    uploading = asyncio.create_task(rig.upload(rig.capture(100)))
    await rig.server.arrived.wait()
    began = time.monotonic()
    rig.stopping.set()
    with pytest.raises(CaptureError):
        await uploading
    assert time.monotonic() - began < 2
    assert not rig.in_thread.is_set()

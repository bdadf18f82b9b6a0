"""The agent's main loop against a process server whose answers cannot be relied on."""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry

from agents.mobility import replicator
from agents.mobility.config import AgentConfig, DiskConfig
from agents.mobility.freeze import Freezer
from agents.mobility.replicator import Replicator
from agents.mobility.source import SourceDisk
from agents.mobility.stream_client import StreamClient
from agents.mobility.stream_state import StreamStateFile
from agents.mobility.tracker.ebpf import EbpfTracker
from daemon.service import Health, Service
from replication.bookmark import NOTHING, Stamp
from replication.stream import StreamState
from replication.watermark import NO_ATTEMPT, Watermark
from tests.agents.mobility.conftest import MakeLoopDisk, OpenDevice
from tests.agents.mobility.script_server import Authority, ScriptServer, running


class Committing:
    """Takes commits; every second answer to one is garbage although it was taken."""

    def __init__(self, server: ScriptServer, machine: uuid.UUID) -> None:
        self._server, self._machine = server, machine
        self.numbers: list[tuple[int, int]] = []
        server.always = self.answer
        self._tell(NOTHING, NO_ATTEMPT)

    def _tell(self, stamp: Stamp, attempt: bytes) -> None:
        self._server.state = StreamState(stamp, attempt, 0, 0, Watermark(self._machine)).to_bytes()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.method != "POST":
            return await self._server.store(request)
        body = await request.read()
        public = json.loads(body[16 : 16 + int.from_bytes(body[8:12], "little")])
        stamp = Stamp(public["generation"], public["number"])
        self.numbers.append((stamp.generation, stamp.number))
        self._tell(stamp, bytes.fromhex(public["attempt"]))
        garbage = len(self.numbers) % 2 == 1
        return web.Response(body=b"<html>" if garbage else self._server.state)


async def test_commit_whose_answer_is_garbage_is_settled_before_the_next_changeset(
    machine: uuid.UUID,
    loop_disk: MakeLoopDisk,
    open_device: OpenDevice,
    tmp_path: Path,
) -> None:
    loop = loop_disk(1 << 20)
    device = open_device(loop.path)
    authority = Authority(tmp_path, "ca")
    key = tmp_path / "key"
    key.write_text("ef" * 32)
    key.chmod(0o600)
    async with running(authority.issue("localhost")) as server:
        committing = Committing(server, machine)
        config = AgentConfig.model_validate(
            {
                "machine": str(machine),
                "data_key_file": str(key),
                "state_folder": str(tmp_path / "state"),
                "process_server": server.origin,
                "tls": authority.issue(str(machine)).model_dump(),
                "disks": [{"index": 0, "device": loop.path}],
                "capture": {"interval_seconds": 0.1, "heartbeat_seconds": 0.1},
            }
        )
        state = StreamStateFile(config.state_folder, machine)
        service = Service(asyncio.Event(), Health(), CollectorRegistry())
        with contextlib.ExitStack() as opened:
            tracker = EbpfTracker.attach(machine, 0, device)
            opened.callback(tracker.close)
            disk = SourceDisk(DiskConfig(index=0, device=loop.path).shape(1 << 20), device, tracker)
            async with StreamClient(
                server.origin,
                machine,
                config.tls,
                config.send,
                stopping=service.stop,
                on_trouble=lambda trouble: None,
            ) as client:
                agent = Replicator(
                    config,
                    [disk],
                    state=state,
                    client=client,
                    freezer=opened.enter_context(Freezer()),
                    service=service,
                    interrupted=None,
                )
                opened.enter_context(_hasty())
                working = asyncio.create_task(agent.run())
                async with asyncio.timeout(60):
                    while len(committing.numbers) < 5:
                        await asyncio.sleep(0.05)
                        assert not working.done()
                service.stop.set()
                await asyncio.wait_for(working, 10)
    assert committing.numbers[:5] == [(1, number) for number in range(1, 6)]


@contextlib.contextmanager
def _hasty() -> Iterator[None]:
    """Trouble is over soon."""
    before = replicator.TROUBLE_SECONDS, replicator.TICK_SECONDS
    replicator.TROUBLE_SECONDS = replicator.TICK_SECONDS = 0.05
    try:
        yield
    finally:
        replicator.TROUBLE_SECONDS, replicator.TICK_SECONDS = before

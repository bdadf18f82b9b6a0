"""An agent as a process, the config server that it follows, and its second site."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.mobility.tracker.pins import ROOT, remove_machine
from replication.control.role import NodeRole
from tests.agents.mobility.control_server import PASSPHRASE, ControlServer, SecondSite, disk
from tests.preloaded import Forked, start_daemon

if TYPE_CHECKING:
    import uuid
    from collections.abc import AsyncIterator, Callable

    from replication.control.report import MachineReport
    from tests.agents.mobility.conftest import LoopDisk

CHECKOUT = Path(__file__).parents[3]
SECONDS_MAX = 60.0


class ControlRig:
    """One machine. Everything lies in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.control = ControlServer(folder)
        context = self.control.context(folder, NodeRole.PROCESS_SERVER)
        self.site = SecondSite(lambda: self.control.data_key, context)
        self.config = folder / "agent.toml"
        self.log = folder / "agent.log"
        self.identity = folder / "identity"
        self.state = folder / "state"
        self._process: Forked | None = None

    @property
    def machine(self) -> uuid.UUID:
        return self.control.machine

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def pins(self) -> Path:
        return Path(ROOT) / str(self.machine)

    @property
    def newest(self) -> MachineReport:
        assert self.control.reports, self.told()
        return self.control.reports[-1]

    def configure(self, *devices: str, more: str = "") -> None:
        self.config.write_text(
            f"""
state_folder = "{self.state}"
{more}
[control]
config_server = "{self.control.listener.origin}"
identity_folder = "{self.identity}"
report_seconds = 0.3
wait_seconds = 5
devices = {json.dumps(list(devices))}
bios_uuid = "420c8f5e-2b1a-9d3c-7e4f-001122334455"
[capture]
heartbeat_seconds = 0.5
pause_share_max = 1.0
[send]
backoff_seconds_max = 0.5
"""
        )

    def command(self, *action: str) -> list[str]:
        return [sys.executable, "-m", "agents.mobility", "--config", str(self.config), *action]

    async def run(self, *action: str) -> tuple[int, str]:
        """Run the command to its end; exit code and what it said."""
        process = await asyncio.create_subprocess_exec(
            *self.command(*action),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=CHECKOUT,
        )
        try:
            said, _ = await asyncio.wait_for(process.communicate(), SECONDS_MAX)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        assert process.returncode is not None
        return process.returncode, said.decode()

    async def enrol(self) -> None:
        passphrase = self.folder / "passphrase"
        passphrase.write_text(PASSPHRASE)
        passphrase.chmod(0o600)
        code, said = await self.run("enrol", "--passphrase-file", str(passphrase))
        assert code == 0, said

    def start(self) -> None:
        assert self._process is None
        with self.log.open("ab") as log:
            self._process = start_daemon(
                "agents.mobility", "--config", str(self.config), log_fd=log.fileno()
            )

    async def stop(self) -> None:
        """SIGTERM; it ends by itself, without a defect."""
        process = self._process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 20)
        self._process = None
        assert code == 0, self.told()

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    async def until(
        self, what: str, holds: Callable[[], object], seconds_max: float = SECONDS_MAX
    ) -> None:
        deadline = time.monotonic() + seconds_max
        while not holds():
            ended = self._process is not None and self._process.poll() is not None
            assert not ended, f"{what}: the agent ended\n{self.told()}"
            assert time.monotonic() < deadline, f"{what}\n{self.told()}"
            await asyncio.sleep(0.05)

    async def reported(self, what: str, holds: Callable[[MachineReport], object]) -> MachineReport:
        """The first report from now on of which it is true."""
        seen = len(self.control.reports)
        await self.until(what, lambda: any(holds(report) for report in self.control.reports[seen:]))
        return next(report for report in self.control.reports[seen:] if holds(report))

    def protect(self, *disks: LoopDisk, **changes: Any) -> None:
        """Assign the disks, numbered from 0, by the names that last."""
        self.control.assign(
            **{
                "protected": True,
                "replicate": True,
                "process_server": self.site.listener.origin,
                "disks": tuple(disk(index, loop.image) for index, loop in enumerate(disks)),
                "interval_seconds": 0.2,
                **changes,
            }
        )

    async def replicated(self, **disks: LoopDisk) -> None:
        """Wait until the second site has the disks, nobody writing; named ``disk0`` and so on."""

        def equal() -> bool:
            return all(
                bytes(self.site.images.get(int(name.removeprefix("disk")), b"")) == content(loop)
                for name, loop in disks.items()
            )

        await self.until(f"equal {sorted(disks)}", equal)

    def told(self) -> str:
        log = self.log.read_text()[-6000:] if self.log.exists() else ""
        report = self.control.reports[-1] if self.control.reports else None
        stamps = [str(manifest.stamp) for manifest in self.site.manifests[-5:]]
        return f"log:\n{log}\nnewest report: {report}\nnewest changesets: {stamps}"


def losetup(*options: str) -> str:
    done = subprocess.run(["losetup", *options], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def content(loop: LoopDisk) -> bytes:
    with open(loop.path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


@contextlib.asynccontextmanager
async def control_rig(folder: Path) -> AsyncIterator[ControlRig]:
    """Both servers up, nobody enrolled; nothing is left afterwards."""
    rig = ControlRig(folder)
    await rig.control.listener.start()
    await rig.site.listener.start()
    rig.configure()
    try:
        yield rig
    finally:
        rig.kill()
        if rig.control.enrolled is not None:
            remove_machine(rig.machine)
        await rig.control.listener.end()
        await rig.site.listener.end()

"""The agent's process with the real config server's; the second site is this test's own."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client import CollectorRegistry

from agents.mobility.tracker.pins import ROOT, remove_machine
from daemon.control_client import ControlClient
from daemon.control_config import ControlConfig
from daemon.enrolment import enrol
from daemon.identity import load
from daemon.service import Health, Service
from replication.control.assignment import ApplierAssignment, ProcessServerAssignment
from replication.control.report import ApplierReport, ProcessServerReport
from replication.control.role import NodeRole
from tests.agents.mobility.control_rig import CHECKOUT, SECONDS_MAX, content
from tests.agents.mobility.control_server import SecondSite
from tests.azure_emu.fixtures import free_ports

if TYPE_CHECKING:
    import uuid
    from collections.abc import AsyncIterator

    from tests.agents.mobility.conftest import LoopDisk, MakeLoopDisk

MIB = 1 << 20


class Site:
    """Config server and agent as processes; process server and applier as far as they report."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.health_port = free_ports(2)
        self.url = f"https://127.0.0.1:{self.port}"
        self.second: SecondSite | None = None
        self.machine: uuid.UUID | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        unlock = folder / "unlock"
        unlock.write_text(secrets.token_hex(32))
        unlock.chmod(0o600)
        self._write(
            "config-server",
            f"""
state_folder = "{folder}/config-server"
[listen]
host = "127.0.0.1"
port = {self.port}
[identity]
unlock_file = "{unlock}"
""",
        )

    def _write(self, name: str, text: str) -> None:
        (self.folder / f"{name}.toml").write_text(text)

    def start(self, name: str) -> None:
        module = {"config-server": "appliance.config_server", "agent": "agents.mobility"}[name]
        command = [sys.executable, "-m", module, "--config", str(self.folder / f"{name}.toml")]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=CHECKOUT)

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait(10)

    def run(self, module: str, name: str, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, "--config", f"{self.folder}/{name}.toml", *arguments],
            cwd=CHECKOUT,
            check=False,
            capture_output=True,
            text=True,
            timeout=SECONDS_MAX,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    async def until(self, what: str, holds: Any) -> Any:
        deadline = time.monotonic() + SECONDS_MAX
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = holds()
                if asyncio.iscoroutine(answer):
                    answer = await answer
                if answer:
                    return answer
            assert time.monotonic() < deadline, f"{what}\n{self.told()}"
            await asyncio.sleep(0.1)

    def configure_agent(self, *disks: LoopDisk) -> None:
        devices = ", ".join(f'"{disk.image}"' for disk in disks)
        self._write(
            "agent",
            f"""
state_folder = "{self.folder}/state"
[control]
config_server = "{self.url}"
identity_folder = "{self.folder}/identity"
report_seconds = 0.5
devices = [{devices}]
[capture]
heartbeat_seconds = 0.5
[send]
backoff_seconds_max = 0.5
[service]
health_port = {self.health_port}
""",
        )

    def data_key(self) -> bytes:
        path = self.folder / "identity" / "data-keys" / f"{self.machine}.key"
        return bytes.fromhex(path.read_text().strip())

    @property
    def site(self) -> SecondSite:
        assert self.second is not None
        return self.second

    async def replicated(self, index: int, loop: LoopDisk) -> None:
        await self.until(
            f"disk {index}", lambda: bytes(self.site.images.get(index, b"")) == content(loop)
        )

    def told(self) -> str:
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {log.name}\n{log.read_text()[-4000:]}" for log in logs)

    def clean_up(self) -> None:
        for name in list(self._processes):
            self.kill(name)
        if self.machine:
            remove_machine(self.machine)


@contextlib.asynccontextmanager
async def second_site(site: Site, passphrase: str) -> AsyncIterator[None]:
    """Process server and applier enrol and report, until the context ends."""
    service = Service(asyncio.Event(), Health(), CollectorRegistry())

    def config(name: str) -> ControlConfig:
        return ControlConfig(
            config_server=site.url,
            identity_folder=str(site.folder / name),
            report_seconds=0.5,
        )

    names = ("127.0.0.1",)
    await enrol(config("ps"), passphrase, NodeRole.PROCESS_SERVER, name="ps", names=names)
    await enrol(config("applier"), passphrase, NodeRole.APPLIER, name="applier")
    tls = load(str(site.folder / "ps")).tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.certificate, tls.key)
    context.load_verify_locations(tls.ca)
    context.verify_mode = ssl.CERT_REQUIRED
    site.second = SecondSite(site.data_key, context)
    await site.second.listener.start()
    url = site.second.listener.origin

    async def of_process_server() -> ProcessServerReport:
        return ProcessServerReport(
            time_ns=time.time_ns(),
            assignment=ps.version,
            url=url,
            spool_max_bytes=1,
            free_bytes=1,
        )

    async def of_applier() -> ApplierReport:
        return ApplierReport(time_ns=time.time_ns(), assignment=applier.version, free_bytes=1)

    try:
        async with (
            ControlClient(
                config("ps"), ProcessServerAssignment, health=service.health, stop=service.stop
            ) as ps,
            ControlClient(
                config("applier"), ApplierAssignment, health=service.health, stop=service.stop
            ) as applier,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(ps.run(of_process_server))
            tasks.create_task(applier.run(of_applier))
            yield
            service.stop.set()
    finally:
        await site.second.listener.end()


@pytest.fixture
async def site(tmp_path: Path, loop_disk: MakeLoopDisk) -> AsyncIterator[Site]:
    """A config server that runs; ends before the loop devices do."""
    assert loop_disk
    made = Site(tmp_path)
    try:
        yield made
    finally:
        made.clean_up()


async def test_machine_is_protected_changed_and_let_go_over_the_api(
    site: Site, loop_disk: MakeLoopDisk
) -> None:
    first, second = loop_disk(4 * MIB), loop_disk(2 * MIB)
    first.write(range(100), b"a")
    second.write(range(50), b"b")
    token = site.run(
        "appliance.config_server",
        "config-server",
        "token",
        "create",
        "boss",
        "--role",
        "contributor",
    )
    site.start("config-server")
    async with httpx.AsyncClient(
        base_url=f"{site.url}/api/v1/",
        headers={"authorization": f"Bearer {token}"},
        verify=False,  # the CA is made while this runs
        timeout=20,
    ) as boss:
        await site.until("an answer", lambda: boss.get("healthz"))
        show = ("appliance.config_server", "config-server", "passphrase", "show")
        async with second_site(site, site.run(*show, "--for", "appliance")):
            site.configure_agent(first, second)
            passphrase = site.run(*show)
            (site.folder / "passphrase").write_text(passphrase)
            (site.folder / "passphrase").chmod(0o600)
            site.run(
                "agents.mobility", "agent", "enrol", "--name", "db",
                "--passphrase-file", f"{site.folder}/passphrase",
            )  # fmt: skip
            site.machine = load(str(site.folder / "identity")).node
            site.start("agent")

            async def machine() -> Any:
                return (await boss.get("machines/db")).json()

            async def knows_disks() -> Any:
                return len((await machine()).get("disks", ())) == 2

            async def done(answer: httpx.Response) -> None:
                assert answer.status_code == 202, answer.text
                path = f"jobs/{answer.json()['id']}"

                async def ended() -> Any:
                    job = (await boss.get(path)).json()
                    return job if job["state"] in ("succeeded", "failed", "cancelled") else None

                job = await site.until("the job", ended)
                assert job["state"] == "succeeded", job

            await site.until("its disks", knows_disks)
            assert (await boss.post("policies", json={"name": "gold"})).is_success
            protect = {"policy": "gold", "disks": [str(first.image)]}

            async def taken(path: str, body: dict[str, Any]) -> httpx.Response:
                """The answer once the agent's report is there, which may be on its way."""

                async def asked() -> httpx.Response | None:
                    answer = await boss.post(path, json=body)
                    return answer if answer.status_code == 202 else None

                found = await site.until("its agent's report", asked)
                assert isinstance(found, httpx.Response)
                return found

            await done(await taken("machines/db/protect", protect))
            await site.replicated(0, first)

            site.kill("config-server")
            site.kill("agent")
            site.start("agent")
            first.write([120], b"c")
            await site.replicated(0, first)
            site.start("config-server")
            await site.until("an answer", lambda: boss.get("healthz"))
            await site.until("its disks again", knows_disks)  # a report, if none was written yet

            await done(await taken("machines/db/disks", {"device": second.path}))
            await site.replicated(1, second)
            assert {manifest.stamp.generation for manifest in site.site.manifests} == {1}

            answer = await boss.post("machines/db/unprotect", json={"keep_points": True})
            await done(answer)
            await site.until("no tracker", lambda: not Path(ROOT, str(site.machine)).exists())
            assert (await machine())["state"] == "unprotected"

"""The whole chain on one machine: agent, process server, Azurite, applier, each a process.

Everything lies in one folder and on free ports. Whatever a test does, ``clean_up`` leaves no
process, frozen file system, mount, loop device or pinned map behind.
"""

import base64
import contextlib
import datetime as dt
import json
import secrets
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agents.mobility.tracker.pins import remove_machine
from appliance.applier.store import Point, ReaderStore, open_reader
from appliance.cli.authority import Authority, create_data_key
from replication.errors import ConfigError
from tests.azure_emu.fixtures import await_closed, free_ports
from tests.e2e.disk import Disk, run
from tests.e2e.part import Part, merged
from tests.e2e.recovered import assert_equals

ACCOUNT = "understudytest"
TICK_SECONDS = 0.1
LOG_CHARS_MAX = 64 << 20


class Rig:
    """One protected machine and its second site.

    ``settings`` of a part are laid over what the rig would configure.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = uuid.uuid4()
        self.disks: list[Disk] = []
        self.settings: dict[str, dict[str, Any]] = {}
        self.store = folder / "store"
        self.spool = folder / "spool"
        self.agent_state = folder / "agent"
        self.azurite_data = folder / "azurite"
        self._memory = folder / "memory"
        self._scratch = 0
        self._notes: list[str] = []
        self.data_port, self.blob_port, self.queue_port, *health = free_ports(7)
        self.azure = Part("azure-emu", "azure_emu", folder, health[0])
        self.process_server = Part("process-server", "appliance.process_server", folder, health[1])
        self.applier = Part("applier", "appliance.applier", folder, health[2])
        self.agent = Part("agent", "agents.mobility", folder, health[3])
        self.parts = (self.azure, self.process_server, self.applier, self.agent)

    def add_disk(self, size_bytes: int, file_system: str = "", *, in_memory: bool = False) -> Disk:
        """A disk, attached and mounted.

        in_memory: its image lies in memory, where an fsync costs nothing: many more writes are
                   acknowledged in a moment than any real disk could.
        """
        if in_memory and not self._memory.exists():
            self._memory.mkdir()
            run("mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", self._memory)
        folder = self._memory if in_memory else self.folder
        disk = Disk(folder, len(self.disks), size_bytes, file_system)
        self.disks.append(disk)
        disk.attach()
        return disk

    def configure(self) -> None:
        """Certificates, keys and the four configuration files, from the disks as they are now."""
        if not (self.folder / "ca").exists():
            Authority.create(str(self.folder / "ca"))
            authority = Authority.open(str(self.folder / "ca"))
            authority.issue_server(["127.0.0.1"], str(self.folder / "server"))
            authority.issue_machine(self.machine, str(self.folder / "client"))
            create_data_key(str(self.folder / "data.key"))
            key = base64.b64encode(secrets.token_bytes(64)).decode()
            self._secret("account.key", key)
            self._secret(
                "connection",
                f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={key};"
                f"BlobEndpoint=http://127.0.0.1:{self.blob_port}/{ACCOUNT};"
                f"QueueEndpoint=http://127.0.0.1:{self.queue_port}/{ACCOUNT};",
            )
        for part, tree in (
            (self.azure, self._azure_config()),
            (self.process_server, self._process_server_config()),
            (self.applier, self._applier_config()),
            (self.agent, self._agent_config()),
        ):
            tree["service"] = {"health_port": part.health_port, "log_level": "debug"}
            part.configure(merged(tree, self.settings.get(part.name, {})))

    def start(self) -> None:
        """Configure and start everything, and return when all parts answer."""
        self.configure()
        self.azure.start()
        for part in (self.process_server, self.applier, self.agent):
            part.start(wait=False)
        for part in self.parts:
            part.await_ready()

    def kill(self, part: Part) -> None:
        """SIGKILL a part; of the emulator, Azurite dies with it."""
        self.note(f"killing {part.name}")
        part.kill()
        if part is self.azure:
            for port in (self.blob_port, self.queue_port):
                await_closed(port)

    def note(self, what: str) -> None:
        """Remember what the test did, with the time, for a failure's report."""
        now = dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
        self._notes.append(f"{now} {what}")

    def agent_status(self) -> dict[str, Any]:
        """What the agent says of itself; empty before it has said anything."""
        try:
            text = (self.agent_state / str(self.machine) / "status.json").read_text()
            status: dict[str, Any] = json.loads(text)
        except (FileNotFoundError, ValueError):
            status = {}
        return status

    def reader(self) -> ReaderStore:
        return open_reader(str(self.store), self.machine)

    def points(self) -> list[Point]:
        """The recovery points, oldest first; none while there is no store."""
        try:
            return self.reader().points()
        except ConfigError:
            return []

    def positions(self) -> list[Point]:
        """All positions of the chain, also those without consistency that are not merged yet."""
        try:
            return list(self.reader().chain().points)
        except ConfigError:
            return []

    def events(self) -> list[dict[str, Any]]:
        """The machine's integrity events, oldest first."""
        path = self.store / "machines" / str(self.machine) / "events.jsonl"
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            lines = []
        return [json.loads(line) for line in lines]

    def wait_until(
        self, what: str, holds: Callable[[], object], seconds_max: float = 120.0
    ) -> None:
        """Return when ``holds()`` is true; AssertionError naming ``what`` and telling of all parts.

        Fails at once when a part that should run has died.
        """
        deadline = time.monotonic() + seconds_max
        while not holds():
            dead = [part.name for part in self.parts if part.is_wanted and not part.is_alive]
            if dead or time.monotonic() > deadline:
                why = f"{dead} died" if dead else f"not within {seconds_max:.0f} s"
                raise AssertionError(f"{what}: {why}\n{self.report()}")
            time.sleep(TICK_SECONDS)

    def wait_for_point(self, seconds_max: float = 120.0, *, after_ns: int | None = None) -> Point:
        """The first point that is taken after ``after_ns``, by default after now."""
        since_ns = time.time_ns() if after_ns is None else after_ns
        found: list[Point] = []

        def has_come() -> bool:
            found[:] = [point for point in self.points() if point.bookmark.time_ns > since_ns]
            return bool(found)

        self.wait_until("a recovery point", has_come, seconds_max)
        return found[0]

    def assert_newest_equals_source(self, seconds_max: float = 120.0) -> Point:
        """With all writing stopped: what comes next is the source, byte for byte."""
        for disk in self.disks:
            disk.flush()
        point = self.wait_for_point(seconds_max)
        for disk in self.disks:
            with self.reader().open_view(point.position, disk.index) as view:
                assert_equals(view, disk.image)
        return point

    def assert_one_unbroken_stream(self) -> None:
        """Generation 1 all along, and no changeset applied twice or backwards."""
        stamps = [point.bookmark.stamp for point in self.positions()]
        assert stamps, "nothing was applied"
        assert {stamp.generation for stamp in stamps} == {1}
        numbers = [stamp.number for stamp in stamps]
        assert numbers == sorted(set(numbers))

    def assert_stops_cleanly(self) -> None:
        """All that runs ends on SIGTERM with code 0, and no log tells of a defect."""
        running = [part for part in self.parts if part.is_alive]
        for part in running:
            part.terminate()
        codes = {part.name: part.stop() for part in running}
        assert set(codes.values()) <= {0}, f"exit codes {codes}\n{self.report()}"
        for part in self.parts:
            said = part.tail(LOG_CHARS_MAX)
            for sign in ("Traceback", "ERROR:asyncio", "Warning:"):
                assert sign not in said, f"{part.name}: {said[said.index(sign) :][:2000]}"

    def scratch(self) -> Path:
        """A new folder."""
        self._scratch += 1
        path = self.folder / f"scratch{self._scratch}"
        path.mkdir()
        return path

    def report(self) -> str:
        """Health, status and the ends of all logs, for a failure's message."""
        lines = ["=== the test", *self._notes]
        for part in self.parts:
            state = "runs" if part.is_alive else f"ended with {part.exit_code}"
            lines.append(f"=== {part.name} {state}; health {part.health()}\n{part.tail()}")
        status = self.agent_status()
        records = status.pop("records", [])[-5:]
        lines.append(f"=== agent status {status}\nrecords {records}")
        with contextlib.suppress(Exception):
            lines.append(f"=== newest positions {[str(p) for p in self.positions()[-3:]]}")
            lines.append(f"=== events {self.events()[-10:]}")
        return "\n".join(lines)

    def clean_up(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(remove_machine, self.machine)
            stack.callback(self._free_memory)
            for disk in self.disks:
                stack.callback(disk.detach)
            for part in self.parts:
                stack.callback(part.clean_up)

    def _free_memory(self) -> None:
        if self._memory.is_mount():
            run("umount", "-l", self._memory)

    def _secret(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)

    def _tls(self, who: str) -> Mapping[str, str]:
        folder = self.folder / who
        return {
            "certificate": f"{folder}/certificate.pem",
            "key": f"{folder}/key.pem",
            "ca": f"{folder}/ca.pem",
        }

    def _azure_config(self) -> dict[str, Any]:
        return {
            "storage": {
                "data_folder": str(self.azurite_data),
                "blob_port": self.blob_port,
                "queue_port": self.queue_port,
                "account": {"name": ACCOUNT, "key_file": str(self.folder / "account.key")},
            }
        }

    def _process_server_config(self) -> dict[str, Any]:
        return {
            "listen": {"host": "127.0.0.1", "port": self.data_port},
            "tls": self._tls("server"),
            "spool": {"folder": str(self.spool), "bytes_max": 1 << 30},
            "cache": {
                "connection_string_file": str(self.folder / "connection"),
                "watermark_seconds": 0.3,
                "watermark_idle_seconds": 1.0,
                "recheck_seconds": 2.0,
            },
        }

    def _applier_config(self) -> dict[str, Any]:
        return {
            "store": str(self.store),
            "cache": {"connection_string_file": str(self.folder / "connection")},
            "retention": {"crash_frequency_seconds": 0},
            "sweep_seconds": 1.0,
            "wake_seconds": 0.2,
            "reask_seconds": 1.0,
            "machines": [
                {
                    "id": str(self.machine),
                    "name": "source",
                    "data_key_file": str(self.folder / "data.key"),
                }
            ],
        }

    def _agent_config(self) -> dict[str, Any]:
        return {
            "machine": str(self.machine),
            "name": "source",
            "data_key_file": str(self.folder / "data.key"),
            "state_folder": str(self.agent_state),
            "process_server": f"https://127.0.0.1:{self.data_port}",
            "tls": self._tls("client"),
            "capture": {
                "interval_seconds": 0.3,
                "heartbeat_seconds": 2.0,
                "pause_share_max": 1.0,
            },
            "send": {"backoff_seconds_max": 2.0},
            "disks": [{"index": disk.index, "device": disk.device} for disk in self.disks],
        }

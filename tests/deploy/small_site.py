"""A whole site with as many small guests as a test wants: every part a process of its own."""

import contextlib
import random
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.cli.api_client import ApiClient
from appliance.config_server.discovery.target import Target, Verify
from appliance.config_server.discovery.vcenter import Session
from deploy.lab.layout import VCENTER_USER, Layout, Ports
from deploy.lab.process import Background
from deploy.lab.proof import list_points
from deploy.lab.stack import Stack, wait_for
from replication.errors import ReplicationError

MIB = 1 << 20
SEEDED_SECONDS_MAX = 180.0
JOB_SECONDS_MAX = 400.0
_GUEST = """\
[[guests]]
name = "{name}"
disks = [{{ name = "root", size_bytes = {size_bytes}, file_system = "ext4" }}]
workload = {{ kind = "web", disk = "root", writes_per_second = 10 }}
"""


def free_hundred() -> int:
    """The first of a hundred ports that nobody has, below those that the kernel gives out."""
    for _ in range(100):
        base = random.randrange(110, 320) * 100
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in range(base, base + 100):
                one = opened.enter_context(socket.socket())
                one.bind(("127.0.0.1", port))
            return base
    raise AssertionError("there are no hundred free ports")


class SmallSite:
    """Guests with one ext4 disk each, protected; whoever runs them; and their operator."""

    def __init__(self, folder: Path, names: tuple[str, ...], *, size_bytes: int) -> None:
        self.names = names
        self.layout = Layout(str(folder / "site"), Ports(free_hundred()))
        self.stack = Stack(self.layout)
        self._size_bytes = size_bytes

    def up(self, *, busy: bool) -> None:
        """Start everything and protect all guests. ``busy``: whether something writes to them."""
        self.layout.make()
        self.layout.make_guests(
            "\n".join(_GUEST.format(name=name, size_bytes=self._size_bytes) for name in self.names)
        )
        guests = self.layout.guests()
        for guest in guests:
            guest.power_on()
            if busy:
                guest.start_workload()
        self.stack.start_control()
        self.stack.start_second_site()
        self.stack.start_agents(guests)
        self.stack.operator.discover(self.names)
        self.stack.operator.set_policy()
        self.stack.operator.protect(self.names)
        wait_for("the initial replication of all guests", self._seeded, SEEDED_SECONDS_MAX)

    def _seeded(self) -> bool:
        news = [self.stack.news(name) for name in self.names]
        if not all(one is not None and one.seeded for one in news):
            return False
        with self.operator() as api:
            states = {one["state"] for one in api.items("/machines")}
        return states == {"protected"} and all(
            list_points(self.layout, name) for name in self.names
        )

    @contextlib.contextmanager
    def operator(self) -> Iterator[ApiClient]:
        with ApiClient(self.stack.operator.sign_in()) as api:
            yield api

    def switch_on(self, name: str) -> None:
        """In the vCenter, as people do it after a failover that was cancelled; then points come."""
        wait_for(f"points of {name}", lambda: self._newest(name), SEEDED_SECONDS_MAX)
        before = self._newest(name)
        with self.operator() as api:
            (row,) = [row for row in api.items("/vms") if row["name"] == name]
        password = Path(self.layout.path("keys", "vcenter.password")).read_text().strip()
        target = Target(
            id=uuid.uuid4(),
            name="lab",
            url=f"https://127.0.0.1:{self.layout.ports.vcenter}",
            username=VCENTER_USER,
            password=password,
            verify=Verify.CA,
            ca_pem=Path(self.layout.path("vsphere", "vcenter", "ca.pem")).read_text(),
            revision=0,
        )
        session = Session(target)
        try:
            session.virtual_machine(row["moid"]).PowerOnVM_Task()
        finally:
            session.close()
        wait_for(
            f"a point of {name} after it was switched on",
            lambda: self._newest(name) > before,
            SEEDED_SECONDS_MAX,
        )

    def _newest(self, name: str) -> str:
        """The name of its newest recovery point; empty while none is served."""
        return max((point.name for point in list_points(self.layout, name)), default="")

    def down(self) -> None:
        """Every trace goes."""
        left = self.stack.down()
        assert not left, left


@contextlib.contextmanager
def small_site(
    folder: Path, names: tuple[str, ...], *, size_bytes: int = 96 * MIB, busy: bool
) -> Iterator[SmallSite]:
    """One that is up; gone afterwards, whatever happens."""
    site = SmallSite(folder, names, size_bytes=size_bytes)
    try:
        site.up(busy=busy)
        yield site
    finally:
        site.down()


def plan_of(name: str, machines: tuple[str, ...]) -> dict[str, Any]:
    """A plan with all of them in one group."""
    return {
        "name": name,
        "groups": [{"name": "all", "machines": [{"machine": m} for m in machines]}],
    }


def ended(api: ApiClient, job_id: str, seconds_max: float = JOB_SECONDS_MAX) -> dict[str, Any]:
    """The job, when it has succeeded. A config server that is away meanwhile is waited for."""
    deadline = time.monotonic() + seconds_max
    job: dict[str, Any] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(ReplicationError):
            job = api.get(f"/jobs/{job_id}")
            assert job["state"] not in ("failed", "cancelled"), job
            if job["state"] == "succeeded":
                return job
        time.sleep(0.25)
    raise AssertionError(f"the job takes over {seconds_max:.0f} s: {job}")


def restart(part: Background) -> None:
    """SIGKILL, and a new start at once, as a supervisor does it."""
    part.kill()
    wait_for(f"the end of {part.name}", lambda: part.pid() is None, 10.0, 0.02)
    part.start()

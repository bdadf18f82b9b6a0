"""The lab's operator: what a person would do with ``understudy`` once the config server runs.

Every request goes over the API with a token, as anybody's would.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from appliance.cli.api_client import ApiClient
from appliance.cli.sign_in import SignIn
from daemon.durable import write_whole
from daemon.identity import is_enrolled
from deploy.lab.layout import VCENTER_USER, Layout
from deploy.lab.process import Background
from replication.control.enrolment import PassphraseKind
from replication.errors import ReplicationError, UnavailableError

OPERATOR = "lab-operator"
POLICY = "lab"
VCENTER = "vcenter-lab"
JOB_SECONDS_MAX = 120.0
DISCOVERY_SECONDS_MAX = 30.0
TICK_SECONDS = 0.25
ENROLMENTS_AT_ONCE = 2
_AGENT = "agent-"
_ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class Seen:
    """A VM of the inventory as the lab tells of it."""

    name: str
    power: str
    disks: int


class Operator:
    """Signs in with a token of its own, made on the config server's host."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def enrol_all(self, parts: Sequence[Background]) -> None:
        """Enrol daemons that are not: each proves the passphrase that its kind has."""
        left = [part for part in parts if not is_enrolled(self._layout.identity(_node_of(part)))]
        if not left:
            return
        passphrases = {
            kind: self.passphrase(kind) for kind in {_passphrase_of(part) for part in left}
        }
        with ThreadPoolExecutor(ENROLMENTS_AT_ONCE) as pool:
            for _ in pool.map(lambda part: self._enrol(part, passphrases), left):
                pass

    def passphrase(self, kind: PassphraseKind) -> str:
        """What daemons of a kind prove when they enrol."""
        return self._config_server("passphrase", "show", "--for", kind)

    def _enrol(self, part: Background, passphrases: dict[PassphraseKind, str]) -> None:
        passphrase = passphrases[_passphrase_of(part)]
        told = ("--name", _node_of(part), "--passphrase-file", "-")
        self._run(part.module, part.name, "enrol", *told, typed=passphrase)

    def sign_in(self) -> SignIn:
        """Make the operator's token where there is none, and write it down for people to use."""
        token_path = self._layout.path("keys", "operator.token")
        if not os.path.exists(token_path):
            token = self._config_server(
                "token", "create", OPERATOR, "--role", "contributor", "--days", "30"
            )
            write_whole(token_path, f"{token.strip()}\n".encode())
        ca_path = os.path.join(self._layout.identity("process-server"), "ca.pem")
        self._write_environment(token_path, ca_path)
        with open(token_path, encoding="ascii") as token_file, open(ca_path) as ca_file:
            return SignIn(
                url=self._layout.config_server_url,
                token=token_file.read().strip(),
                ca_pem=ca_file.read(),
            )

    def _write_environment(self, token_path: str, ca_path: str) -> None:
        """What a shell sources to sign in; the token itself stays in its own file."""
        text = (
            f'export UNDERSTUDY_URL="{self._layout.config_server_url}"\n'
            f'export UNDERSTUDY_CA="{ca_path}"\n'
            f'export UNDERSTUDY_TOKEN="$(cat {token_path})"\n'
        )
        write_whole(self._layout.operator_env, text.encode())

    def discover(self, names: Sequence[str]) -> list[Seen]:
        """Add the vCenter and wait until its VMs are in the inventory."""
        with ApiClient(self.sign_in()) as api:
            if not any(row["name"] == VCENTER for row in api.items("/vcenters")):
                with open(self._layout.path("keys", "vcenter.password"), encoding="utf-8") as file:
                    password = file.read().strip()
                api.post(
                    "/vcenters",
                    {
                        "name": VCENTER,
                        "url": f"https://127.0.0.1:{self._layout.ports.vcenter}",
                        "username": VCENTER_USER,
                        "password": password,
                        **self._trust(),
                    },
                )
            deadline = time.monotonic() + DISCOVERY_SECONDS_MAX
            while time.monotonic() < deadline:
                rows = {row["name"]: row for row in api.items("/vms")}
                if set(names) <= set(rows):
                    return [
                        Seen(name, rows[name]["power"], len(rows[name]["disks"])) for name in names
                    ]
                time.sleep(TICK_SECONDS)
            state = next(row for row in api.items("/vcenters") if row["name"] == VCENTER)
        raise UnavailableError(
            f"{VCENTER} shows no {', '.join(sorted(set(names) - set(rows)))}: {state}"
        )

    def set_policy(self) -> dict[str, Any]:
        """The lab's policy: every point is kept, resyncs may begin at any time."""
        with ApiClient(self.sign_in()) as api:
            for row in api.items("/policies"):
                if row["name"] == POLICY:
                    return row
            made: dict[str, Any] = api.post(
                "/policies",
                {"name": POLICY, "crash_frequency_seconds": 1, "resync_window": "always"},
            )
            return made

    def protect(self, names: Sequence[str], seconds_max: float = JOB_SECONDS_MAX) -> None:
        """Protect machines that are not, and wait for the jobs; raises what the first one says."""
        with ApiClient(self.sign_in()) as api:
            unprotected = {row["name"] for row in api.items("/machines", {"unprotected": True})}
            jobs = {
                name: api.post(f"/machines/{name}/protect", {"policy": POLICY})["id"]
                for name in names
                if name in unprotected
            }
            deadline = time.monotonic() + seconds_max
            while jobs:
                for name, job_id in list(jobs.items()):
                    job = api.get(f"/jobs/{job_id}")
                    if job["state"] not in _ENDED:
                        continue
                    if job["state"] != "succeeded":
                        raise ReplicationError(f"protecting {name}: {job['error']}")
                    del jobs[name]
                if jobs and time.monotonic() > deadline:
                    raise UnavailableError(f"protecting {', '.join(jobs)} takes too long")
                time.sleep(TICK_SECONDS)

    def machines(self) -> dict[str, dict[str, Any]]:
        """The enrolled machines by name, as the API tells of them."""
        with ApiClient(self.sign_in()) as api:
            return {row["name"]: row for row in api.items("/machines")}

    def _trust(self) -> dict[str, Any]:
        """The CA that the lab's vCenter has made for itself."""
        with open(self._layout.path("vsphere", "vcenter", "ca.pem"), encoding="ascii") as file:
            return {"ca_pem": file.read()}

    def _config_server(self, *arguments: str) -> str:
        return self._run("appliance.config_server", "config-server", *arguments)

    def _run(self, module: str, name: str, *arguments: str, typed: str = "") -> str:
        """Run a daemon's own command with its configuration file; its output."""
        done = subprocess.run(
            [sys.executable, "-m", module, "--config", self._layout.config(name), *arguments],
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ReplicationError(f"{module} {arguments[0]}: {done.stderr.strip()}")
        return done.stdout


def _node_of(part: Background) -> str:
    """What a daemon is called as a node: an agent has the name of its machine."""
    return part.name.removeprefix(_AGENT)


def _passphrase_of(part: Background) -> PassphraseKind:
    """Agents prove the machines' one, all others the appliance's."""
    is_agent = part.name.startswith(_AGENT)
    return PassphraseKind.MACHINES if is_agent else PassphraseKind.APPLIANCE

"""Real vCenters, played by the vSphere emulator in processes of their own, for any test.

In a conftest: ``from tests.vsphere_emu.fixtures import make_vcenter  # noqa: F401``.
"""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pyVmomi import SoapAdapter, vim, vmodl

from tests.azure_emu.fixtures import await_closed, free_ports
from vsphere_emu.config import Config
from vsphere_emu.datastore import Datastore
from vsphere_emu.guest import Guest, GuestStatus

START_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
TASK_SECONDS_MAX = 20.0
USER = "administrator@vsphere.local"
PASSWORD = "a pass & word <of> 'all' \"kinds\""
API_VERSION = "vim.version.version11"
MIB = 1 << 20


class VCenterProcess:
    """``python -m vsphere_emu serve`` in a folder, with guests by their configurations' keys."""

    def __init__(self, folder: Path, name: str, guests: list[dict[str, Any]], **keys: Any) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.name = name
        self.port = free_ports(1)[0]
        self.guests = guests
        self.keys = keys
        self.config = self.folder / "vsphere.toml"
        self.log = self.folder / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None
        password = self.folder / "password"
        password.write_text(PASSWORD + "\n")
        password.chmod(0o600)
        self.write()

    def write(self) -> None:
        """Write the configuration anew; it counts from the next start on."""
        tree = {
            "root_folder": str(self.folder / "root"),
            "datastore": {"folder": str(self.folder / "store")},
            "guests": self.guests,
            "vcenter": {
                "name": self.name,
                "port": self.port,
                "password_file": str(self.folder / "password"),
                **self.keys,
            },
        }
        self.config.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in tree.items()))

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def ca_pem(self) -> str:
        return (self.folder / "root/vcenter/ca.pem").read_text()

    @property
    def certificate_pem(self) -> str:
        return (self.folder / "root/vcenter/certificate.pem").read_text()

    @property
    def vcsim_pid(self) -> int:
        assert self._process is not None
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def start(self) -> None:
        assert self._process is None, "started already"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vsphere_emu", "--config", str(self.config), "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + START_SECONDS_MAX
        while f"what='vcenter {self.name}'".encode() not in self.log.read_bytes():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the vCenter did not start: {self.log.read_text()}")
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM; return the exit code."""
        process, self._process = self._process, None
        assert process is not None, "not started"
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(STOP_SECONDS_MAX)
        finally:
            process.kill()
            process.wait()

    def kill(self) -> None:
        """SIGKILL the emulator, and with it the vCenter."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        await_closed(self.port)

    def kill_vcsim(self) -> None:
        """SIGKILL the vCenter alone; the emulator restarts it."""
        os.kill(self.vcsim_pid, signal.SIGKILL)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another command of the emulator with the same configuration."""
        command = [sys.executable, "-m", "vsphere_emu", "--config", str(self.config), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def remove(self) -> None:
        """Leave nothing behind."""
        self.kill()
        for guest in self._guests():
            guest.remove_all_traces(delete_disks=True)

    def status(self, name: str) -> GuestStatus:
        """A guest as the kernel knows it."""
        return next(one for one in self._guests() if one.config.name == name).status()

    def _guests(self) -> list[Guest]:
        config = Config.load(str(self.config), {})
        datastore = Datastore(config.datastore.name, config.datastore.folder)
        return [Guest(guest, datastore, config.root_folder) for guest in config.guests]

    def client(self) -> "Client":
        return Client(self)


class Client:
    """Somebody who works at a vCenter. Not the code under test: pyvmomi by itself."""

    def __init__(self, vcenter: VCenterProcess) -> None:
        soap: Any = SoapAdapter
        types: Any = vim
        stub = soap.SoapStubAdapter(
            host="127.0.0.1",
            port=vcenter.port,
            version=API_VERSION,
            sslContext=ssl.create_default_context(cadata=vcenter.ca_pem),
            httpConnectionTimeout=30,
        )
        self.content: Any = types.ServiceInstance("ServiceInstance", stub).RetrieveContent()
        self.content.sessionManager.Login(USER, PASSWORD, None)

    def vm(self, name: str) -> Any:
        return self.find(vim.VirtualMachine, name)

    def find(self, kind: Any, name: str) -> Any:
        view = self.content.viewManager.CreateContainerView(self.content.rootFolder, [kind], True)
        try:
            return next(one for one in view.view if one.name == name)
        finally:
            view.DestroyView()

    def finish(self, task: Any) -> Any:
        """Wait for a task as pyVim's own way, which races, does not: through the collector."""
        deadline = time.monotonic() + TASK_SECONDS_MAX
        while time.monotonic() < deadline:
            told = self.properties(task, "info.state", "info.error", "info.result")
            if told["info.state"] in ("success", "error"):
                assert told["info.state"] == "success", told.get("info.error")
                return told.get("info.result")
            time.sleep(0.01)
        raise AssertionError("the task does not end")

    def properties(self, of: Any, *paths: str) -> dict[str, Any]:
        query: Any = vmodl.query.PropertyCollector
        spec = query.FilterSpec(
            objectSet=[query.ObjectSpec(obj=of)],
            propSet=[query.PropertySpec(type=type(of), pathSet=list(paths))],
        )
        (told,) = self.content.propertyCollector.RetrieveContents([spec])
        return {one.name: one.val for one in told.propSet}

    def terminate_others(self) -> int:
        """End all sessions but this one, as an administrator would; returns how many."""
        manager = self.content.sessionManager
        others = [one.key for one in manager.sessionList if one.key != manager.currentSession.key]
        manager.TerminateSession(others)
        return len(others)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items())
        return f"{{ {inside} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


def small_guest(name: str, **keys: Any) -> dict[str, Any]:
    """A guest with a raw disk of 4 MiB."""
    return {"name": name, "disks": [{"name": "root", "size_bytes": 4 * MIB}], **keys}


MakeVCenter = Callable[..., VCenterProcess]


@pytest.fixture
def make_vcenter(tmp_path: Path) -> Iterator[MakeVCenter]:
    """Starts vCenters by name, guests and keys of ``[vcenter]``; nothing is left of them."""
    made: list[VCenterProcess] = []

    def make(name: str, guests: list[dict[str, Any]], **keys: Any) -> VCenterProcess:
        vcenter = VCenterProcess(tmp_path, name, guests, **keys)
        made.append(vcenter)
        vcenter.start()
        return vcenter

    try:
        yield make
    finally:
        for vcenter in made:
            vcenter.remove()

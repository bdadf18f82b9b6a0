"""Where the lab keeps what, and the configuration files that it writes for the daemons.

Everything lies in one folder, and everything in it can be read by a person: the daemons' TOML files
are what somebody would write for machines of their own.
"""

import base64
import os
import secrets
import uuid
from dataclasses import dataclass

from daemon.durable import make_folder
from vsphere_emu.config import Config as VsphereConfig
from vsphere_emu.datastore import Datastore
from vsphere_emu.guest import Guest

FOLDER_DEFAULT = "/var/lib/understudy-lab"
ACCOUNT = "understudylab"
_NAMESPACE = uuid.UUID("7a0f9c9e-6d0e-4f59-9a1b-6f2f60a3c1d4")
_MIB = 1 << 20

GUESTS = f"""\
root_folder = "{{root}}/vsphere"

[datastore]
name = "datastore1"
folder = "{{root}}/datastore1"

[[guests]]
name = "web-01"
disks = [{{{{ name = "root", size_bytes = {2048 * _MIB}, file_system = "ext4" }}}}]
workload = {{{{ kind = "web", disk = "root", writes_per_second = 40 }}}}

[[guests]]
name = "db-01"
disks = [
    {{{{ name = "data", size_bytes = {2048 * _MIB}, file_system = "ext4" }}}},
    {{{{ name = "wal", size_bytes = {1024 * _MIB}, file_system = "xfs" }}}},
]
workload = {{{{ kind = "pgbench", data_disk = "data", wal_disk = "wal", scale = 5, clients = 4, \
transactions_per_second = 200 }}}}

[[guests]]
name = "files-01"
disks = [{{{{ name = "share", size_bytes = {2048 * _MIB}, file_system = "btrfs" }}}}]
workload = {{{{ kind = "files", disk = "share", changes_per_second = 30, \
trim_interval_seconds = 3 }}}}
"""


@dataclass(frozen=True, slots=True)
class Ports:
    """Loopback ports of the lab; the next free hundred can be had by ``--port-base``."""

    base: int = 9400

    @property
    def process_server(self) -> int:
        return self.base + 43

    @property
    def blob(self) -> int:
        return self.base + 10

    @property
    def queue(self) -> int:
        return self.base + 11

    def health(self, index: int) -> int:
        return self.base + 50 + index


@dataclass(frozen=True, slots=True)
class Layout:
    """The lab's folder."""

    root: str
    ports: Ports = Ports()

    def path(self, *parts: str) -> str:
        return os.path.join(self.root, *parts)

    @property
    def store(self) -> str:
        return self.path("store")

    @property
    def points(self) -> str:
        return self.path("points")

    @property
    def scratch(self) -> str:
        return self.path("scratch")

    @property
    def config_folder(self) -> str:
        return self.path("config")

    def config(self, name: str) -> str:
        return os.path.join(self.config_folder, f"{name}.toml")

    def agent_status(self, guest: str) -> str:
        return self.path("agents", guest, str(machine_id(guest)), "status.json")

    def guests(self) -> list[Guest]:
        """The guests as the vSphere emulator has them."""
        config = VsphereConfig.load(self.config("vsphere"), {})
        datastore = Datastore(config.datastore.name, config.datastore.folder)
        return [Guest(guest, datastore, config.root_folder) for guest in config.guests]

    def make(self) -> None:
        """Create the folders and the files that need no guest to be running."""
        for folder in ("config", "keys", "log", "run", "points", "scratch", "agents"):
            make_folder(self.path(folder), mode=0o755)
        key_file = self.path("keys", "account.key")
        if not os.path.exists(key_file):
            _write(key_file, base64.b64encode(secrets.token_bytes(64)).decode() + "\n", mode=0o600)
        with open(key_file, encoding="ascii") as file:
            key = file.read().strip()
        _write(
            self.path("keys", "cache.connection"),
            "DefaultEndpointsProtocol=http;"
            f"AccountName={ACCOUNT};AccountKey={key};"
            f"BlobEndpoint=http://127.0.0.1:{self.ports.blob}/{ACCOUNT};"
            f"QueueEndpoint=http://127.0.0.1:{self.ports.queue}/{ACCOUNT};\n",
            mode=0o600,
        )
        _write(self.config("vsphere"), GUESTS.format(root=self.root))
        _write(
            self.config("azure"),
            f'[storage]\ndata_folder = "{self.path("azurite")}"\n'
            f"blob_port = {self.ports.blob}\nqueue_port = {self.ports.queue}\n\n"
            f'[storage.account]\nname = "{ACCOUNT}"\nkey_file = "{key_file}"\n\n'
            f"[service]\nhealth_port = {self.ports.health(2)}\n",
        )
        _write(
            self.config("process-server"),
            f'[listen]\nhost = "127.0.0.1"\nport = {self.ports.process_server}\n\n'
            f"{self._tls('process-server')}\n"
            f'[spool]\nfolder = "{self.path("spool")}"\nbytes_max = {4096 * _MIB}\n\n'
            f'[cache]\nconnection_string_file = "{self.path("keys", "cache.connection")}"\n\n'
            f"[service]\nhealth_port = {self.ports.health(0)}\n",
        )

    def write_applier(self, guests: list[Guest]) -> None:
        machines = "".join(
            f'\n[[machines]]\nid = "{machine_id(guest.config.name)}"\n'
            f'name = "{guest.config.name}"\n'
            f'data_key_file = "{self.path("keys", f"{guest.config.name}.key")}"\n'
            for guest in guests
        )
        _write(
            self.config("applier"),
            f'store = "{self.store}"\npoints_mount = "{self.points}"\n\n'
            f'[cache]\nconnection_string_file = "{self.path("keys", "cache.connection")}"\n\n'
            "# A real site keeps one point every five minutes; the lab shows more of them.\n"
            "[retention]\nretention_days = 1\ncrash_frequency_seconds = 0\n\n"
            f"[service]\nhealth_port = {self.ports.health(1)}\n{machines}",
        )

    def write_agent(self, guest: Guest, health_index: int) -> None:
        """The agent's file names the loop devices that the guest's disks have just now."""
        name = guest.config.name
        disks = "".join(
            f'\n[[disks]]\nindex = {index}\nname = "{disk.name}"\ndevice = "{disk.device}"\n'
            for index, disk in enumerate(guest.status().disks)
        )
        _write(
            self.config(f"agent-{name}"),
            f'machine = "{machine_id(name)}"\nname = "{name}"\n'
            f'data_key_file = "{self.path("keys", f"{name}.key")}"\n'
            f'state_folder = "{self.path("agents", name)}"\n'
            f'process_server = "https://127.0.0.1:{self.ports.process_server}"\n\n'
            f"{self._tls(name)}\n[capture]\ninterval_seconds = 5\n\n"
            f"[service]\nhealth_port = {self.ports.health(health_index)}\n{disks}",
        )

    def _tls(self, who: str) -> str:
        folder = self.path("certificates", who)
        return (
            f'[tls]\ncertificate = "{folder}/certificate.pem"\nkey = "{folder}/key.pem"\n'
            f'ca = "{folder}/ca.pem"\n'
        )


def machine_id(guest: str) -> uuid.UUID:
    """The machine's id: the same in every lab, so that a second run finds its own."""
    return uuid.uuid5(_NAMESPACE, guest)


def _write(path: str, text: str, *, mode: int = 0o644) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)

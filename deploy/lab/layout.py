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
VCENTER_USER = "administrator@vsphere.local"
ACCOUNT = "understudylab"
_NAMESPACE = uuid.UUID("7a0f9c9e-6d0e-4f59-9a1b-6f2f60a3c1d4")
_MIB = 1 << 20

_VCENTER = f"""\
root_folder = "{{root}}/vsphere"

[vcenter]
name = "vcenter-lab"
port = {{vcenter_port}}
user = "{VCENTER_USER}"
password_file = "{{root}}/keys/vcenter.password"

[datastore]
name = "datastore1"
folder = "{{root}}/datastore1"

"""

_GUESTS = f"""\
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

[[guests]]
name = "boot-01"
disks = [{{{{ name = "os", size_bytes = {1024 * _MIB}, file_system = "ext4", \
mount_options = "noatime,nodev,nosuid", image = "{{image}}" }}}}]
workload = {{{{ kind = "system", disk = "os", writes_per_second = 20 }}}}
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

    @property
    def config_server(self) -> int:
        return self.base + 44

    @property
    def vcenter(self) -> int:
        return self.base + 89

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
        return self.path("agents", guest, str(self.machine_id(guest)), "status.json")

    def machine_id(self, guest: str) -> uuid.UUID:
        """The same whenever this lab runs, so that it finds its own; another lab has others."""
        return uuid.uuid5(_NAMESPACE, os.path.join(os.path.abspath(self.root), guest))

    def guests(self) -> list[Guest]:
        """The guests as the vSphere emulator has them."""
        config = VsphereConfig.load(self.config("vsphere"), {})
        datastore = Datastore(config.datastore.name, config.datastore.folder)
        return [Guest(guest, datastore, config.root_folder) for guest in config.guests]

    @property
    def config_server_url(self) -> str:
        return f"https://127.0.0.1:{self.ports.config_server}"

    @property
    def operator_env(self) -> str:
        """For a shell to source."""
        return self.path("operator.env")

    def identity(self, node: str) -> str:
        """Where a node keeps its key, its certificate and what it was told."""
        return self.path("identity", node)

    def make_guests(self, guests: str) -> None:
        """Write the vSphere emulator's file. ``guests``: that part of it, see `lab_guests`."""
        self._secret("vcenter.password", secrets.token_urlsafe(18).encode())
        _write(
            self.config("vsphere"),
            _VCENTER.format(root=self.root, vcenter_port=self.ports.vcenter)
            + f"{guests}\n[service]\nhealth_port = {self.ports.health(3)}\n",
        )

    def make(self) -> None:
        """Create the folders, and the files of all daemons that know no guest."""
        for folder in (
            "config", "keys", "log", "run", "points", "scratch", "agents", "identity",
        ):  # fmt: skip
            make_folder(self.path(folder), mode=0o755)
        account_key = self._secret("account.key", base64.b64encode(secrets.token_bytes(64)))
        self._secret("unlock.key", secrets.token_hex(32).encode())
        _write(
            self.path("keys", "cache.connection"),
            "DefaultEndpointsProtocol=http;"
            f"AccountName={ACCOUNT};AccountKey={account_key};"
            f"BlobEndpoint=http://127.0.0.1:{self.ports.blob}/{ACCOUNT};"
            f"QueueEndpoint=http://127.0.0.1:{self.ports.queue}/{ACCOUNT};\n",
            mode=0o600,
        )
        _write(
            self.config("azure"),
            f'[storage]\ndata_folder = "{self.path("azurite")}"\n'
            f"blob_port = {self.ports.blob}\nqueue_port = {self.ports.queue}\n\n"
            f'[storage.account]\nname = "{ACCOUNT}"\n'
            f'key_file = "{self.path("keys", "account.key")}"\n\n'
            f"[service]\nhealth_port = {self.ports.health(2)}\n",
        )
        _write(
            self.config("config-server"),
            f'state_folder = "{self.path("config-server")}"\n\n'
            f'[listen]\nhost = "127.0.0.1"\nport = {self.ports.config_server}\n\n'
            f'[identity]\nunlock_file = "{self.path("keys", "unlock.key")}"\n\n'
            "# A real site keeps one point every five minutes; the lab shows more of them.\n"
            "[policies]\nallow_short_crash_frequency = true\n\n"
            f"[service]\nhealth_port = {self.ports.health(4)}\n",
        )
        _write(
            self.config("process-server"),
            f'[listen]\nhost = "127.0.0.1"\nport = {self.ports.process_server}\n'
            'names = ["127.0.0.1", "localhost"]\n\n'
            f"{self._control('process-server')}\n"
            f'[spool]\nfolder = "{self.path("spool")}"\nbytes_max = {4096 * _MIB}\n\n'
            f'[cache]\nconnection_string_file = "{self.path("keys", "cache.connection")}"\n\n'
            f"[service]\nhealth_port = {self.ports.health(0)}\n",
        )
        _write(
            self.config("applier"),
            f'store = "{self.store}"\npoints_mount = "{self.points}"\npoints_seconds = 1\n\n'
            f"{self._control('applier')}\n"
            f'[cache]\nconnection_string_file = "{self.path("keys", "cache.connection")}"\n\n'
            f"[service]\nhealth_port = {self.ports.health(1)}\n",
        )
        _write(
            self.config("compute"),
            f'points_folder = "{self.points}"\ndata_folder = "{self.path("compute")}"\n'
            "boots_max = 3\n\n"
            f"{self._control('compute')}\n"
            "# Networks of the VMs are network namespaces with these names.\n"
            f'[network]\nnamespaces = "lab{self.ports.base}"\n\n'
            f"[service]\nhealth_port = {self.ports.health(5)}\n",
        )

    def write_agent(self, guest: Guest, health_index: int) -> None:
        """The agents of all guests run on this one machine: each is told which disks are its own,
        and the BIOS UUID that firmware would tell it.
        """
        name = guest.config.name
        images = ", ".join(f'"{disk.flat_path}"' for disk in guest.status().disks)
        _write(
            self.config(f"agent-{name}"),
            f'state_folder = "{self.path("agents", name)}"\n\n'
            f"{self._control(name)}"
            f'machine = "{self.machine_id(name)}"\nbios_uuid = "{guest.config.identity}"\n'
            f"devices = [{images}]\n\n"
            f"[service]\nhealth_port = {self.ports.health(health_index)}\n",
        )

    def _control(self, node: str) -> str:
        return (
            f'[control]\nconfig_server = "{self.config_server_url}"\n'
            f'identity_folder = "{self.identity(node)}"\nreport_seconds = 2\n'
        )

    def _secret(self, name: str, made: bytes) -> str:
        """The content of a file of secrets, ``made`` where there is none yet."""
        path = self.path("keys", name)
        if not os.path.exists(path):
            _write(path, made.decode() + "\n", mode=0o600)
        with open(path, encoding="ascii") as file:
            return file.read().strip()


def lab_guests(image: str) -> str:
    """The lab's guests as TOML. ``image``: the bootable disk image that one's disk is a copy of."""
    return _GUESTS.format(image=image)


def _write(path: str, text: str, *, mode: int = 0o644) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "w") as file:
        file.write(text)

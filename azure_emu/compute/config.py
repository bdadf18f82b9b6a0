"""What the compute node is told: where points and its own data lie, and what it may use."""

import ipaddress
import os
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from azure_emu.compute.guest.build import default_folder
from daemon.config import DaemonConfig, Section
from daemon.control_config import ControlConfig
from daemon.service import ServiceConfig

MEMORY_SHARE_DEFAULT = 0.5
NAMESPACE_CHARACTERS_MAX = 32


class NetworkConfig(Section):
    """Networks of the VMs, each a Linux network namespace with a bridge.

    pool:       each network gets a part of it that no other has.
    prefix:     length of the prefix of such a part.
    namespaces: how the names of the namespaces begin; two compute nodes on a host need two.
    uplink:     a namespace that networks which are not isolated are joined to; empty: to none.
    dhcp:       tell VMs their addresses with dnsmasq.
    """

    pool: str = "10.90.0.0/16"
    prefix: Annotated[int, Field(ge=8, le=29)] = 24
    namespaces: Annotated[
        str, Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=NAMESPACE_CHARACTERS_MAX)
    ] = "understudy"
    uplink: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*$", max_length=64)] = ""
    dhcp: bool = True

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.prefix < self.addresses.prefixlen:
            raise ValueError(f"a network with a prefix of {self.prefix} does not fit {self.pool}")
        return self

    @property
    def addresses(self) -> ipaddress.IPv4Network:
        """The pool. Raises ValueError for what is no network."""
        return ipaddress.IPv4Network(self.pool)


class ComputeConfig(DaemonConfig):
    """The compute node's configuration file.

    points_folder:    where the applier's recovery points are mounted.
    data_folder:      disks and states of the VMs.
    guest_folder:     the recovery guest; empty: where set-up builds it.
    accelerator:      ``auto`` takes KVM after a probe boot has worked, else emulation.
    memory_bytes_max: of all running VMs together; 0: half of the host's.
    boots_max:        VMs that boot and are checked at once.
    landlock:         ``required`` runs nothing on a kernel that cannot keep QEMU to its VM's files;
                      ``optional`` runs it there with what else confines it.
    """

    points_folder: str
    data_folder: str
    guest_folder: Annotated[str, Field(validate_default=True)] = ""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    memory_bytes_max: Annotated[int, Field(ge=0)] = 0
    boots_max: Annotated[int, Field(ge=1, le=64)] = 2
    landlock: Literal["required", "optional"] = "required"
    network: NetworkConfig = NetworkConfig()
    control: ControlConfig | None = None
    service: ServiceConfig = ServiceConfig()

    @field_validator("points_folder", "data_folder", "guest_folder")
    @classmethod
    def _absolute(cls, path: str, info: ValidationInfo) -> str:
        if info.field_name == "guest_folder" and not path:
            return default_folder()
        if not os.path.isabs(path):
            raise ValueError("an absolute path was expected")
        return os.path.normpath(path)

    def memory_max(self) -> int:
        """Bytes that all running VMs together may have."""
        if self.memory_bytes_max:
            return self.memory_bytes_max
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(total * MEMORY_SHARE_DEFAULT)

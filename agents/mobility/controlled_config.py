"""What an agent can be told that follows a config server, and what it makes of an assignment."""

import os
import tomllib
import uuid
from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from agents.mobility.config import AgentConfig, AgentSettings
from agents.mobility.inventory import find
from daemon.config import ENVIRONMENT_PREFIX
from daemon.control_config import ControlConfig
from daemon.tls import TlsFiles
from replication.control.assignment import MachineAssignment
from replication.control.report import BlockDevice
from replication.errors import ConfigError, PeerError


class AgentControlConfig(ControlConfig):
    """The ``[control]`` section of an agent.

    machine:   the id to enrol with, where the machine has one already; else one is chosen.
    devices:   disks that may be told of and replicated, by id, path or image; empty: all.
    bios_uuid: by which the machine is matched to a VM, where the firmware does not tell it.
    """

    machine: uuid.UUID | None = None
    devices: tuple[str, ...] = ()
    bios_uuid: uuid.UUID | None = None


class ControlledConfig(AgentSettings):
    """The whole configuration of ``understudy-agent`` that follows a config server."""

    control: AgentControlConfig


def load_config(
    path: str, environ: Mapping[str, str] = os.environ
) -> AgentConfig | ControlledConfig:
    """Read the file and the environment: with a ``[control]`` section the one, else the other.

    Raises ConfigError that names the key.
    """
    if _has_control(path, environ):
        return ControlledConfig.load(path, environ)
    return AgentConfig.load(path, environ)


def _has_control(path: str, environ: Mapping[str, str]) -> bool:
    if any(name.upper().startswith(f"{ENVIRONMENT_PREFIX}CONTROL__") for name in environ):
        return True
    try:
        with open(path, "rb") as file:
            return "control" in tomllib.load(file)
    except (OSError, ValueError):  # whoever loads it tells why
        return False


def assigned_config(
    config: ControlledConfig,
    assignment: MachineAssignment,
    devices: Iterable[BlockDevice],
    *,
    tls: TlsFiles,
    data_key_file: str,
) -> AgentConfig:
    """The configuration of a run that follows an assignment, with the disks as they are now.

    Raises ConfigError for a disk that this machine does not have, PeerError for an assignment that
    nobody could follow.
    """
    devices = tuple(devices)
    disks = []
    for disk in assignment.disks:
        found = find(devices, disk.device)
        if found is None:
            raise ConfigError(
                f"disk {disk.index}, {disk.name or disk.device}, is not on this machine: "
                f"{disk.device}",
                hint="attach it again, or exclude it from the protection",
            )
        disks.append(
            {"index": disk.index, "device": found.device, "name": disk.name or disk.device}
        )
    tree = {
        **config.model_dump(include=set(AgentSettings.model_fields)),
        "machine": assignment.machine,
        "name": assignment.name,
        "process_server": assignment.process_server,
        "disks": disks,
        "tls": tls,
        "data_key_file": data_key_file,
    }
    tree["capture"]["interval_seconds"] = assignment.interval_seconds
    tree["app_consistency"]["interval_seconds"] = assignment.app_interval_seconds
    try:
        return AgentConfig.model_validate(tree)
    except ValidationError as error:
        told = error.errors()[0]
        where = ".".join(str(part) for part in told["loc"])
        raise PeerError(
            f"assignment {assignment.version} cannot be followed: {where}: {told['msg']}"
        ) from error

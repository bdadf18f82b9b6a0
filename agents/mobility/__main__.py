"""``understudy-agent``: the mobility agent of one protected machine."""

import argparse
import os
import sys
import uuid

from agents.mobility import controlled
from agents.mobility.app_scripts import check_scripts
from agents.mobility.config import AgentConfig
from agents.mobility.controlled_config import ControlledConfig, load_config
from agents.mobility.device import Device
from agents.mobility.freeze import thaw_all
from agents.mobility.host import read_host
from agents.mobility.leave import leave_order
from agents.mobility.machine_folder import hold, run_owed_scripts
from agents.mobility.measures import AgentMeasures
from agents.mobility.mounts import mounted_file_systems
from agents.mobility.stream_run import Running, refuse_untrackable, replicate
from agents.mobility.tracker.pins import remove_machine
from daemon.durable import make_folder
from daemon.enrolment import add_enrol_options, enrol_command
from daemon.identity import is_enrolled
from daemon.service import Service, fail, run_daemon
from replication.control.role import NodeRole
from replication.errors import ConfigError, ReplicationError

ACTIONS = ("run", "check", "thaw", "forget", "enrol", "resync")


def main() -> int:
    """Parse the command line and run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="understudy-agent", description="Replicates the disks of this machine."
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    parser.add_argument(
        "action",
        nargs="?",
        choices=ACTIONS,
        default="run",
        help="run (the default); check the configuration and the disks; thaw file systems that "
        "were left frozen, and run the post scripts that are owed; forget: stop tracking this "
        "machine's disks; enrol with the config server; resync: have the running agent compare the "
        "disks with the second site now",
    )
    add_enrol_options(parser)
    options = parser.parse_args()
    # The interpreter may lie on a disk that is frozen: reading from it goes on, writing would wait.
    sys.dont_write_bytecode = True
    try:
        config = load_config(options.config)
        if options.action == "enrol":
            return _enrol(options, config)
        if options.action == "thaw":
            _thaw(config)
            return 0
        if options.action == "forget":
            remove_machine(_machine_of(config))
            return 0
        if options.action == "resync":
            _order_resync(config)
            return 0
        check_scripts((*config.app_consistency.pre, *config.app_consistency.post))
        if isinstance(config, AgentConfig):
            config.data_key()
        if options.action == "check":
            _check(config)
            return 0
    except ReplicationError as error:
        return fail(error)
    return run_daemon("agent", config.service, lambda service: _serve(config, service))


async def _serve(config: AgentConfig | ControlledConfig, service: Service) -> None:
    """Do as the configuration or the config server says until ``service.stop`` is set."""
    if isinstance(config, ControlledConfig):
        await controlled.serve(config, service)
        return
    measures = AgentMeasures(service.registry)

    def on_running(running: Running) -> None:
        measures.status = running.replicator.status

    with hold(config.state_folder, config.machine):
        await replicate(config, service, on_running=on_running)


def _order_resync(config: AgentConfig | ControlledConfig) -> None:
    if isinstance(config, ControlledConfig):
        raise ConfigError(
            "this machine does as its config server says",
            hint="order the resync there: understudy resync MACHINE --now",
        )
    folder = os.path.join(config.state_folder, str(config.machine))
    make_folder(folder)
    leave_order(folder)


def _enrol(options: argparse.Namespace, config: AgentConfig | ControlledConfig) -> int:
    control = config.control if isinstance(config, ControlledConfig) else None
    return enrol_command(
        options,
        control,
        NodeRole.MACHINE,
        node=control.machine if control else None,
        bios_uuid=read_host(control.bios_uuid).bios_uuid if control else None,
    )


def _machine_of(config: AgentConfig | ControlledConfig) -> uuid.UUID:
    if isinstance(config, AgentConfig):
        return config.machine
    return controlled.assignment_on_disk(config)[0].node


def _disks_of(config: AgentConfig | ControlledConfig) -> list[str]:
    """Paths of the disks to replicate; those of an assignment that are not here are left out."""
    if isinstance(config, AgentConfig):
        return [disk.device for disk in config.disks]
    return controlled.assigned_paths(config)


def _thaw(config: AgentConfig | ControlledConfig) -> None:
    """Thaw what lies on the disks; one that is missing keeps no other one frozen.

    Then the post scripts of an agent that was killed; one that runs sees to its own.
    """
    if isinstance(config, ControlledConfig) and not is_enrolled(config.control.identity_folder):
        return
    trouble: list[ReplicationError] = []
    for path in _disks_of(config):
        try:
            device = Device.open(path)
            try:
                thawed = thaw_all([fs.mount_point for fs in mounted_file_systems(device)])
                for place in thawed:
                    print(f"{place} had been left frozen")  # noqa: T201 - a user's, or the journal
            finally:
                device.close()
        except ReplicationError as error:
            trouble.append(error)
    app = config.app_consistency
    folder, machine = config.state_folder, _machine_of(config)
    report = run_owed_scripts(folder, machine, app.post, app.script_seconds_max)
    if report is not None:
        told = f", but {report.reason}" if report.reason else ""
        print(f"post scripts were owed and have run{told}")  # noqa: T201 - as above
    if trouble:
        raise trouble[0]


def _check(config: AgentConfig | ControlledConfig) -> None:
    for path in _disks_of(config):
        device = Device.open(path)
        refuse_untrackable(config, device)
        device.close()


if __name__ == "__main__":
    sys.exit(main())

"""The applier: ``understudy-applier --config FILE.toml``."""

import argparse
import asyncio
import contextlib
import functools
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

from appliance.applier.cache_account import WAKE_COUNT_MAX, CacheAccount
from appliance.applier.config import ApplierConfig
from appliance.applier.control import follow, static_targets
from appliance.applier.fetch import ByteWindow
from appliance.applier.fleet import Fleet
from appliance.applier.lease import lease_owner
from appliance.applier.metrics import ApplierMetrics
from appliance.applier.points_server import serve_points_apart
from appliance.applier.removal import finish_removals
from appliance.applier.shared import Shared
from daemon.control_client import ControlClient
from daemon.durable import make_folder, storage_error, write_whole
from daemon.enrolment import add_enrol_options, enrol_command
from daemon.service import Service, fail, run_daemon
from replication.control.assignment import ApplierAssignment
from replication.control.role import NodeRole
from replication.errors import ConfigError, ReplicationError, StorageError, UnavailableError

OPENER_COUNT = 2
"""Threads that decrypt and unpack."""

_ID_FILE = "applier.id"


def main() -> int:
    """Read the configuration and run until told to stop; return the exit code."""
    parser = argparse.ArgumentParser(prog="understudy-applier", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    parser.add_argument("action", nargs="?", choices=("run", "enrol"), default="run")
    add_enrol_options(parser)
    arguments = parser.parse_args()
    try:
        config = ApplierConfig.load(arguments.config)
    except ReplicationError as error:
        return fail(error)
    if arguments.action == "enrol":
        return enrol_command(arguments, config.control, NodeRole.APPLIER)
    return run_daemon("applier", config.service, functools.partial(serve, config))


async def serve(config: ApplierConfig, service: Service) -> None:
    """Apply the machines of the configuration, or of the config server, until ``service.stop``."""
    targets = static_targets(config)
    make_folder(config.store)
    try:
        await asyncio.to_thread(finish_removals, config.store)
    except StorageError as error:
        service.health.report("removals", warning=str(error))
    owner = lease_owner(read_applier_id(config.store))
    async with contextlib.AsyncExitStack() as stack:
        account = config.cache.open()
        stack.push_async_callback(account.close)
        control = None
        if config.control is not None:
            client = ControlClient(
                config.control, ApplierAssignment, health=service.health, stop=service.stop
            )
            control = await stack.enter_async_context(client)
        shared = Shared(
            config=config,
            account=account,
            owner=owner,
            window=ByteWindow(config.fetch_bytes_max, config.fetches_max),
            slots=asyncio.Semaphore(config.applies_max),
            pool=stack.enter_context(ThreadPoolExecutor(OPENER_COUNT, "opener")),
            health=service.health,
            metrics=ApplierMetrics(service.registry),
            report_now=control.report_now if control is not None else lambda: None,
        )
        async with asyncio.TaskGroup() as group:
            fleet = Fleet(shared, group)
            await fleet.follow(targets)
            tasks = [group.create_task(_listen(config, account, fleet), name="queue")]
            if control is not None:
                following = follow(control, fleet, config, service)
                tasks.append(group.create_task(following, name="control"))
            if config.points_mount is not None:
                serving = serve_points_apart(config, service.health)
                tasks.append(group.create_task(serving, name="points"))
            service.ready(f"{len(targets)} machines" if control is None else "a config server's")
            await service.stop.wait()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await fleet.stop()


async def _listen(config: ApplierConfig, account: CacheAccount, fleet: Fleet) -> None:
    """Wake machines by the queue's messages; what is missed here a sweep finds."""
    while True:
        by_id = {applier.id_text: applier for applier in fleet.appliers.values()}
        texts: set[str] = set()
        try:
            texts = await account.wakes(by_id.keys())
        except (UnavailableError, StorageError):
            await asyncio.sleep(config.sweep_seconds)
        for text in texts & by_id.keys():
            by_id[text].wake()
        if len(texts) < WAKE_COUNT_MAX:
            await asyncio.sleep(config.wake_seconds)


def read_applier_id(store: str) -> uuid.UUID:
    """Who this applier is; made up once and kept in its store's folder."""
    path = os.path.join(store, _ID_FILE)
    try:
        with open(path, encoding="ascii") as file:
            return uuid.UUID(file.read().strip())
    except FileNotFoundError:
        made = uuid.uuid4()
        write_whole(path, f"{made}\n".encode())
        return made
    except ValueError as error:
        raise ConfigError(f"{path} holds no UUID", hint="remove it; a new one is made") from error
    except OSError as error:
        raise storage_error("read", path, error) from error


if __name__ == "__main__":
    sys.exit(main())

"""The Azure emulator: runs the cache storage account until SIGTERM or SIGINT."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from prometheus_client import Gauge

from azure_emu.azurite import Azurite
from azure_emu.config import Config
from daemon.service import Service, fail, run_daemon
from replication.errors import ConfigError

HEALTH_INTERVAL_SECONDS = 0.25


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the emulator; the exit code is 0 after a signal, else that of the error's class."""
    parser = argparse.ArgumentParser(prog="understudy-azure-emu", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    try:
        config = Config.load(parser.parse_args(arguments).config)
    except ConfigError as error:
        return fail(error)
    return run_daemon("azure-emu", config.service, lambda service: _serve(config, service))


async def _serve(config: Config, service: Service) -> None:
    running = asyncio.create_task(_run(config, service), name="azurite")
    stopping = asyncio.create_task(service.stop.wait(), name="stop")
    try:
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
    finally:
        stopping.cancel()
        running.cancel()
        await asyncio.wait({running})


async def _run(config: Config, service: Service) -> None:
    async with Azurite(config.storage) as azurite, asyncio.TaskGroup() as tasks:
        restarts = Gauge(
            "understudy_azurite_restarts",
            "How often a service of Azurite has been restarted",
            registry=service.registry,
        )
        restarts.set_function(lambda: azurite.restarts)
        tasks.create_task(azurite.watch(), name="supervision")
        tasks.create_task(_report(azurite, service), name="health")
        service.ready(f"cache storage account {config.storage.account.name}")


async def _report(azurite: Azurite, service: Service) -> None:
    while True:
        down = ", ".join(azurite.down)
        service.health.report("azurite", critical=f"{down}: being restarted" if down else "")
        await asyncio.sleep(HEALTH_INTERVAL_SECONDS)


if __name__ == "__main__":
    sys.exit(main())

"""The Azure emulator: runs the cache storage account until SIGTERM or SIGINT."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

import structlog

from azure_emu.azurite import Azurite
from azure_emu.config import Config
from daemon.log import configure_log
from replication.errors import ReplicationError

_log = structlog.get_logger()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the emulator; the exit code is 0 after a signal, else that of the error's class."""
    parser = argparse.ArgumentParser(prog="understudy-azure-emu", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    try:
        config = Config.load(parser.parse_args(arguments).config)
        configure_log(daemon="azure-emu", as_json=config.log.json_lines, level=config.log.level)
        asyncio.run(_serve(config))
    except ReplicationError as error:
        sys.stderr.write(f"understudy-azure-emu: {error}\n")
        return error.exit_code
    return 0


async def _serve(config: Config) -> None:
    task, loop, stopped = asyncio.current_task(), asyncio.get_running_loop(), False

    def stop() -> None:
        nonlocal stopped
        if not stopped and task is not None:
            stopped = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        async with Azurite(config.storage) as azurite:
            _log.info("cache storage account ready", account=config.storage.account.name)
            await azurite.watch()
    except asyncio.CancelledError:
        if not stopped:
            raise
        _log.info("stopped")


if __name__ == "__main__":
    sys.exit(main())

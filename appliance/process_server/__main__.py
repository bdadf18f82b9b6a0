"""The process server: takes agents' streams, spools them, uploads them into the cache."""

import argparse
import asyncio
import contextlib
import sys

from appliance.process_server.cache_account import CacheAccount, open_cache_account
from appliance.process_server.config import Config
from appliance.process_server.control import controlled, follow, open_admission, open_tls
from appliance.process_server.disk_threads import DiskThreads
from appliance.process_server.listener import listen
from appliance.process_server.measures import Measures
from appliance.process_server.persistence import Persistence
from appliance.process_server.receiver import Receiver
from appliance.process_server.room import CRITICAL_RATIO, WARNING_RATIO, Room
from appliance.process_server.spool import Spool
from appliance.process_server.stream import Stream
from appliance.process_server.streams import Streams
from appliance.process_server.upload_budget import UploadBudget
from appliance.process_server.uploader import Uploader
from appliance.process_server.watcher import Watcher
from daemon.enrolment import add_enrol_options, enrol_command
from daemon.service import Health, Service, fail, run_daemon
from replication.control.role import NodeRole
from replication.errors import IntegrityError, ReplicationError

GAUGE_SECONDS = 0.5
HEAP_MAPPED_BYTES_MIN = 2 << 20
"""Bodies arrive in pieces of up to this size."""
CONNECTIONS_BESIDE_UPLOADS = 16
"""For watermarks, listings and wake-ups, which must not wait for uploads."""


async def serve(service: Service, config: Config) -> None:
    """Run until ``service.stop`` is set, then finish the requests that have begun."""
    connection_string = config.cache.read_connection_string()
    with DiskThreads() as disk:
        spool = await disk.run(Spool, config.spool.folder)
        try:
            async with open_cache_account(
                connection_string,
                api_version=config.cache.api_version,
                connections_max=config.cache.uploads_max + CONNECTIONS_BESIDE_UPLOADS,
            ) as cache:
                await _serve_with(service, config, disk, spool, cache)
        finally:
            spool.close()


async def _serve_with(
    service: Service, config: Config, disk: DiskThreads, spool: Spool, cache: CacheAccount
) -> None:
    measures = Measures(service.registry)
    persistence = Persistence(service.health, measures)
    budget = UploadBudget(config.cache.uploads_max, config.cache.upload_bytes_max)
    uploader = Uploader(
        cache, disk, budget, persistence, measures, recheck_seconds=config.cache.recheck_seconds
    )
    watcher = Watcher(cache, uploader, config.cache, persistence, measures, health=service.health)
    room = Room(config.spool.bytes_max)
    admission, tls = open_admission(config), open_tls(config)

    async def tend(stream: Stream) -> None:
        part = f"spool of {stream.machine}"
        try:
            async with asyncio.TaskGroup() as pair:
                pair.create_task(uploader.run(stream), name=f"upload {stream.machine}")
                pair.create_task(watcher.run(stream), name=f"watch {stream.machine}")
        except* IntegrityError as damage:
            # One machine's damaged spool must not stop the others; a person has to look.
            service.health.report(part, critical=str(_first(damage)))

    async with contextlib.AsyncExitStack() as stack:
        control = None
        if config.control is not None:
            client = controlled(config.control, service, admission, tls)
            control = await stack.enter_async_context(client)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        streams = Streams(
            spool,
            room,
            disk,
            cache,
            limits=config.limits,
            on_new=lambda stream: tending.append(tasks.create_task(tend(stream))),
            expected=lambda: len(admission.machines or ()),
        )
        tending: list[asyncio.Task[None]] = []
        await streams.restore()
        tending.append(tasks.create_task(_gauge(service.health, measures, streams)))
        receiver = Receiver(streams, config.limits, admission, measures)
        async with listen(config.listen, tls, config.limits, receiver.handle) as port:
            if control is not None:
                following = follow(control, admission, streams, service, config.listen.url(port))
                tending.append(tasks.create_task(following, name="control"))
            service.ready(f"agents on port {port}")
            await service.stop.wait()
        for task in tending:
            task.cancel()


async def _gauge(health: Health, measures: Measures, streams: Streams) -> None:
    """Keep the gauges and the spool's part of the health up to date."""
    room = streams.room
    measures.spool_bytes_max.set(room.bytes_max)
    while True:
        measures.spool_bytes.set(room.taken_bytes)
        measures.unapplied_changesets.set(sum(len(stream.held) for stream in streams.all))
        told = f"the spool holds {room.taken_bytes} of at most {room.bytes_max} bytes"
        if room.fill > CRITICAL_RATIO:
            health.report("spool", critical=told)
        else:
            health.report("spool", warning=told if room.fill > WARNING_RATIO else "")
        await asyncio.sleep(GAUGE_SECONDS)


def _first(group: BaseException) -> BaseException:
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


def main() -> int:
    """Run the process server and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="understudy-process-server",
        description="Takes agents' streams over HTTPS, keeps them safe, uploads them.",
    )
    parser.add_argument("--config", required=True, metavar="FILE.toml")
    parser.add_argument("action", nargs="?", choices=("run", "enrol"), default="run")
    add_enrol_options(parser)
    options = parser.parse_args()
    try:
        config = Config.load(options.config)
    except ReplicationError as error:
        return fail(error)
    if options.action == "enrol":
        names = config.listen.certificate_names()
        return enrol_command(options, config.control, NodeRole.PROCESS_SERVER, names=names)
    return run_daemon(
        "process-server",
        config.service,
        lambda service: serve(service, config),
        mapped_bytes_min=HEAP_MAPPED_BYTES_MIN,
    )


if __name__ == "__main__":
    sys.exit(main())

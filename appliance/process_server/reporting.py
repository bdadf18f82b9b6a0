"""What the process server says of itself to the config server.

Source: docs/CONTROL.md §5.
"""

import asyncio
import importlib.metadata
import os
import time

from appliance.process_server.stream import Stream, held_in_order
from appliance.process_server.streams import Streams
from daemon.load import LoadMeter
from daemon.service import Health
from daemon.troubles import troubles_of
from replication.control.report import ProcessServerReport, StreamReport

_NS = 1e9


class Reporter:
    """Makes reports. ``url``: where agents reach this process server."""

    def __init__(self, url: str, streams: Streams, health: Health) -> None:
        self._url = url
        self._streams = streams
        self._health = health
        self._load = LoadMeter()
        self._started_ns = time.time_ns()
        self._software = importlib.metadata.version("understudy")

    async def report(self, assignment: int) -> ProcessServerReport:
        """The whole report of now; ``assignment`` is the version that is followed."""
        now_ns = time.time_ns()
        found = await asyncio.to_thread(os.statvfs, self._streams.spool.folder)
        return ProcessServerReport(
            software=self._software,
            time_ns=now_ns,
            started_ns=self._started_ns,
            assignment=assignment,
            load=self._load.read(),
            troubles=troubles_of(self._health),
            url=self._url,
            spool_bytes=self._streams.room.taken_bytes,
            spool_max_bytes=self._streams.room.bytes_max,
            free_bytes=found.f_bavail * found.f_frsize,
            streams=tuple(stream_report(stream, now_ns) for stream in self._streams.all),
        )


def stream_report(stream: Stream, now_ns: int) -> StreamReport:
    """What is known of one machine. The backlog is what is not yet whole in the cache."""
    waiting = [one for one in held_in_order(stream) if not one.whole]
    return StreamReport(
        machine=stream.machine,
        generation=stream.position.committed.generation,
        number=stream.position.committed.number,
        durable_ns=stream.durable_ns,
        backlog_bytes=sum(one.size_bytes for one in waiting),
        backlog_seconds=max(0.0, (now_ns - waiting[0].committed_ns) / _NS) if waiting else 0.0,
    )

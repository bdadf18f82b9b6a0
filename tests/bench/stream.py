"""Agent to process server, and the whole path into the cache storage account."""

import contextlib
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from agents.mobility.config import SendConfig
from agents.mobility.tracker.pins import remove_machine
from appliance.cli.authority import Authority
from appliance.process_server.order import Position
from appliance.process_server.spool import Ledger, Spool
from tests.bench import plain
from tests.bench.cpu import cpu_of
from tests.bench.figure import AtLeast, Row, ShareOfLimit, spread
from tests.bench.place import GIB, MIB, Place, write_compressible, write_random
from tests.e2e.rig import Rig

SECONDS_MAX = 300.0


def measure_agent(where: Place) -> list[Row]:
    """Agent to process server: source data a second, spool on disk, no cache."""
    size_bytes = (1 if where.quick else 2) * GIB
    rows = []
    for kind, target, fill in (
        ("incompressible", 250, write_random),
        ("compressible", 300, write_compressible),
    ):
        rates, limits = [], []
        for _ in range(1 if where.quick else 3):
            where.rest()
            rates.append(_spool_rate(where, size_bytes, fill))
            where.rest()
            limits.append(_limit(where, kind, size_bytes))
        rows.append(
            Row(
                figure=f"agent to process server, {kind}",
                unit="MB/s",
                target=AtLeast(target),
                measured=statistics.median(rates),
                limit=statistics.median(limits),
                limit_is="plain aiohttp over TLS, same bodies, nothing written"
                if kind == "incompressible"
                else "zstd and AES alone, two threads",
                note=spread(rates),
            )
        )
    return rows


def _spool_rate(where: Place, size_bytes: int, fill: Callable[[Path, int], None]) -> float:
    """Source MB a second of an initial replication that ends in the spool."""
    with where.rig(process_server={"spool": {"bytes_max": 4 * size_bytes}}) as rig:
        disk = rig.add_disk(size_bytes)
        fill(disk.image, size_bytes)
        rig.configure()
        know_the_machine(rig)
        rig.process_server.start()
        rig.agent.start(wait=False)
        rig.wait_until("the initial replication", lambda: is_sent(rig), SECONDS_MAX)
        records = rig.agent_status()["records"]
        seconds = sum(record["taken_seconds"] for record in records)
        return float(sum(record["changed_bytes"] for record in records) / seconds / 1e6)


def know_the_machine(rig: Rig) -> None:
    """Give the spool the machine's ledger, without which it would first ask the cache."""
    spool = Spool(str(rig.spool))
    spool.write_ledger(rig.machine, Ledger(Position()))
    spool.close()


def is_sent(rig: Rig) -> bool:
    """Whether a changeset that holds all that was to do has been committed."""
    records = rig.agent_status().get("records", [])
    return bool(records) and records[-1]["left_bytes"] == 0


def _limit(where: Place, kind: str, size_bytes: int) -> float:
    if kind == "compressible":
        half = bytes(range(64)) * 32

        def data(count: int) -> bytes:
            return b"".join(os.urandom(2048) + half for _ in range(count // 4096))

        return plain.seal(data, size_bytes) / 1e6
    send = SendConfig()
    with where.rig() as rig:
        rig.configure()
        with plain.tls_sink(rig.folder / "server") as origin:
            return (
                plain.tls_upload(
                    origin,
                    rig.folder / "client" / "ca.pem",
                    total_bytes=size_bytes,
                    body_bytes=send.segment_bytes,
                    in_flight=send.segments_in_flight_max,
                )
                / 1e6
            )


def measure_cache(where: Place) -> list[Row]:
    """The whole path into Azurite, against the blob client alone into the same one."""
    size_bytes = (256 if where.quick else 1024) * MIB
    shapes = [(8, 4)] if where.quick else [(4, 4), (8, 2), (8, 4), (8, 8), (16, 4), (32, 4)]
    where.need_bytes(12 * size_bytes)
    with where.rig() as rig:
        disk = rig.add_disk(size_bytes)
        write_random(disk.image, size_bytes)
        rig.configure()
        rig.azure.start()
        connection = (rig.folder / "connection").read_text()

        def alone(shape: tuple[int, int], total_bytes: int) -> float:
            where.rest()
            mebibytes, concurrency = shape
            return (
                plain.blob_upload(
                    connection,
                    total_bytes=total_bytes,
                    body_bytes=mebibytes * MIB,
                    concurrency=concurrency,
                )
                / 1e6
            )

        alone(shapes[0], 128 * MIB)  # Azurite's first blobs are slow
        found = {shape: alone(shape, size_bytes // 2) for shape in shapes}
        best = max(found, key=lambda shape: found[shape])
        limits, rates = [], []
        for _ in range(1 if where.quick else 4):
            limits.append(alone(best, size_bytes))
            where.rest()
            with _another_machine(rig):
                rate, profile = _path_rate(rig)
                rates.append(rate)
        limits.append(alone(best, size_bytes))
    limit = statistics.median(limits)
    return [
        Row(
            figure="whole path into Azurite",
            unit="MB/s",
            target=ShareOfLimit(0.85),
            measured=statistics.median(rates),
            limit=limit,
            limit_is=f"blob client alone, {best[0]} MiB blobs, {best[1]} at once",
            note=f"{spread(rates)}; alone {spread(limits)}; {profile}",
        )
    ]


@contextlib.contextmanager
def _another_machine(rig: Rig) -> Iterator[None]:
    """The same disk as another machine: no state of the agent's, nothing in spool and cache."""
    remove_machine(rig.machine)
    rig.machine = uuid.uuid4()
    shutil.rmtree(rig.folder / "client")
    authority = Authority.open(str(rig.folder / "ca"))
    authority.issue_machine(rig.machine, str(rig.folder / "client"))
    rig.configure()
    rig.process_server.start()
    try:
        yield
    finally:
        rig.agent.kill()
        rig.process_server.kill()
        shutil.rmtree(rig.spool)


def _path_rate(rig: Rig) -> tuple[float, str]:
    """MB a second that come into the cache, from the changeset's begin to its manifest, and who
    used the processors meanwhile.
    """
    rig.agent.start(wait=False)
    server = rig.process_server
    rig.wait_until("a changeset", lambda: rig.agent_status().get("under_way"))
    began = time.monotonic()
    with cpu_of([rig.agent, server, rig.azure]) as shares:
        rig.wait_until("the initial replication", lambda: is_sent(rig), SECONDS_MAX)
        sent = server.metric("understudy_bytes_received_total")
        rig.wait_until(
            "all of it in the cache",
            lambda: server.metric("understudy_bytes_uploaded_total") > sent,
            SECONDS_MAX,
        )
    return sent / (time.monotonic() - began) / 1e6, shares.told()

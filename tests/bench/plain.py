"""What the plain parts reach: the limits that the figures are held against."""

import asyncio
import contextlib
import itertools
import os
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
from azure.storage.blob.aio import BlobServiceClient

from replication.bookmark import Stamp
from replication.envelope import AttemptSealer
from replication.extent import Extent
from tests.azure_emu.fixtures import free_ports
from tests.bench.place import MIB

PIECE_BYTES = MIB
READY_SECONDS_MAX = 20.0
SEALING_THREADS = 2

_SINK = """
import asyncio, ssl, sys
from aiohttp import web

async def take(request):
    async for _ in request.content.iter_any():
        pass
    return web.Response(status=201)

async def main(port, folder):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(f"{folder}/certificate.pem", f"{folder}/key.pem")
    runner = web.ServerRunner(web.Server(take))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(int(sys.argv[1]), sys.argv[2]))
"""


@contextlib.contextmanager
def tls_sink(certificate_folder: Path) -> Iterator[str]:
    """An aiohttp server over TLS 1.3, a process of its own, that reads bodies and forgets them.

    Yields its origin.
    """
    (port,) = free_ports(1)
    command = [sys.executable, "-c", _SINK, str(port), str(certificate_folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == b"ready", "the plain server did not start"
            yield f"https://127.0.0.1:{port}"
        finally:
            process.kill()


def tls_upload(
    origin: str, ca: Path, *, total_bytes: int, body_bytes: int, in_flight: int
) -> float:
    """Bytes a second that aiohttp alone puts there, bodies of ``body_bytes`` side by side."""

    async def work() -> float:
        context = ssl.create_default_context(cafile=str(ca))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        body = os.urandom(body_bytes)
        left = itertools.count()

        async def pieces() -> "asyncio.AsyncIterator[memoryview]":  # type: ignore[name-defined]
            view = memoryview(body)
            for at in range(0, len(view), PIECE_BYTES):
                yield view[at : at + PIECE_BYTES]

        async def put(session: aiohttp.ClientSession) -> None:
            while (number := next(left)) < total_bytes // body_bytes:
                headers = {"Content-Length": str(body_bytes)}
                async with session.put(
                    f"{origin}/{number}", data=pieces(), headers=headers
                ) as response:
                    assert response.status == 201

        connector = aiohttp.TCPConnector(ssl=context, limit=in_flight)
        async with aiohttp.ClientSession(connector=connector) as session:
            began = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(in_flight):
                    tasks.create_task(put(session))
            return total_bytes // body_bytes * body_bytes / (time.monotonic() - began)

    return asyncio.run(work())


def seal(data: Callable[[int], bytes], total_bytes: int) -> float:
    """Bytes a second that zstd and AES take in frames of 1 MiB, on SEALING_THREADS threads."""
    sealer = AttemptSealer(bytes(32), uuid.uuid4(), Stamp(1, 1))
    frames = [data(MIB) for _ in range(8)]

    def one(number: int) -> int:
        extents = [Extent(number * 256, 256)]
        return len(sealer.seal_frame(sealer.next_number(), 0, extents, frames[number % 8]))

    with ThreadPoolExecutor(SEALING_THREADS) as pool:
        began = time.monotonic()
        count = sum(1 for _ in pool.map(one, range(total_bytes // MIB)))
        return count * MIB / (time.monotonic() - began)


def blob_upload(
    connection_string: str, *, total_bytes: int, body_bytes: int, concurrency: int
) -> float:
    """Bytes a second that the blob client alone puts into an account, one Put Blob a body."""

    async def work() -> float:
        body = os.urandom(body_bytes)
        container = f"plain-{uuid.uuid4().hex}"
        left = itertools.count()
        async with BlobServiceClient.from_connection_string(
            connection_string, api_version="2026-06-06", max_single_put_size=64 * MIB
        ) as service:
            client = await service.create_container(container)

            async def put() -> None:
                while (number := next(left)) < max(1, total_bytes // body_bytes):
                    await client.upload_blob(f"{number:06}", body, length=body_bytes)

            began = time.monotonic()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(concurrency):
                    tasks.create_task(put())
            rate = max(1, total_bytes // body_bytes) * body_bytes / (time.monotonic() - began)
            await client.delete_container()
            return rate

    return asyncio.run(work())


def blob_round_trip(connection_string: str, *, body_bytes: int, count: int) -> float:
    """Seconds to put so many bodies and to get them again, four side by side."""

    async def work() -> float:
        body = os.urandom(body_bytes)
        async with BlobServiceClient.from_connection_string(
            connection_string, api_version="2026-06-06", max_single_put_size=64 * MIB
        ) as service:
            client = await service.create_container(f"plain-{uuid.uuid4().hex}")
            gate = asyncio.Semaphore(4)

            async def put(number: int) -> None:
                async with gate:
                    await client.upload_blob(f"{number:06}", body, length=body_bytes)

            async def get(number: int) -> None:
                async with gate:
                    found = await client.download_blob(f"{number:06}")
                    await found.readall()

            began = time.monotonic()
            for step in (put, get):
                async with asyncio.TaskGroup() as tasks:
                    for number in range(count):
                        tasks.create_task(step(number))
            took = time.monotonic() - began
            await client.delete_container()
            return took

    return asyncio.run(work())


def write_and_sync(folder: Path, total_bytes: int) -> float:
    """Bytes a second that one writer brings to stable storage, 1 MiB at a time."""
    path = folder / "plain.write"
    body = os.urandom(MIB)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        began = time.monotonic()
        for _ in range(total_bytes // MIB):
            os.write(fd, body)
        os.fsync(fd)
        return total_bytes / (time.monotonic() - began)
    finally:
        os.close(fd)
        path.unlink()

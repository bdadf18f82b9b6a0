import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from azure.core.exceptions import HttpResponseError, ResourceExistsError
from azure.storage.blob.aio import BlobServiceClient, ContainerClient
from azure.storage.queue.aio import QueueClient

from azure_emu.azurite import AZURITE_API_VERSION, Azurite
from azure_emu.config import Account, Storage, Tls
from replication.errors import ConfigError
from tests.azure_emu.fixtures import EmulatorProcess, await_closed, free_ports

BODY = secrets.token_bytes(300_000)


def storage(folder: Path, *, tls: Tls | None = None) -> Storage:
    blob_port, queue_port = free_ports(2)
    return Storage(
        data_folder=str(folder / "data"),
        blob_port=blob_port,
        queue_port=queue_port,
        account=Account.model_validate({"name": "cache1", "key": "A" * 86 + "=="}),
        tls=tls,
    )


def container(connection_string: str, name: str = "machine") -> ContainerClient:
    return ContainerClient.from_connection_string(
        connection_string, name, api_version=AZURITE_API_VERSION
    )


async def put(connection_string: str, name: str) -> None:
    async with container(connection_string) as client:
        if not await client.exists():
            await client.create_container()
        await client.upload_blob(name, BODY)


async def get(connection_string: str, name: str) -> bytes:
    async with container(connection_string) as client:
        return await (await client.download_blob(name)).readall()


async def test_blob_comes_back_and_is_created_only_once(azurite: EmulatorProcess) -> None:
    await put(azurite.connection_string, "1/000000")
    assert await get(azurite.connection_string, "1/000000") == BODY
    async with container(azurite.connection_string) as client:
        with pytest.raises(ResourceExistsError):
            await client.upload_blob("1/000000", BODY)


async def test_message_comes_out_of_the_queue(azurite: EmulatorProcess) -> None:
    async with QueueClient.from_connection_string(
        azurite.connection_string, "applier", api_version=AZURITE_API_VERSION
    ) as client:
        await client.create_queue()
        await client.send_message("machine 7")
        assert [m.content async for m in client.receive_messages()] == ["machine 7"]


async def test_unpinned_client_is_refused(azurite: EmulatorProcess) -> None:
    """Why every client pins the version: the SDK's own default is newer than Azurite."""
    async with BlobServiceClient.from_connection_string(azurite.connection_string) as client:
        with pytest.raises(HttpResponseError, match="API version"):
            await client.get_service_properties()


async def test_well_known_account_is_not_served(azurite: EmulatorProcess) -> None:
    foreign = f"DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;AccountKey={'A' * 88};"
    foreign += f"BlobEndpoint=http://127.0.0.1:{azurite.blob_port}/devstoreaccount1;"
    with pytest.raises(HttpResponseError):
        await get(foreign, "1")


async def test_sigterm_keeps_what_was_acknowledged(emulator: EmulatorProcess) -> None:
    emulator.start()
    await put(emulator.connection_string, "kept")
    services = emulator.service_pids
    since = time.monotonic()
    assert emulator.stop() == 0
    assert time.monotonic() - since < 10
    assert not alive(services)
    emulator.start()
    assert await get(emulator.connection_string, "kept") == BODY


def test_health_tells_of_an_outage_and_of_its_end(emulator: EmulatorProcess) -> None:
    (port,) = free_ports(1)
    emulator.config.write_text(f"{emulator.config.read_text()}\n[service]\nhealth_port = {port}\n")
    emulator.start()
    assert state(port) == "normal"
    emulator.kill_services()
    await_state(port, "critical")
    await_state(port, "normal")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert "understudy_azurite_restarts 2.0" in answer.read().decode()


async def test_killed_services_are_restarted(emulator: EmulatorProcess) -> None:
    emulator.start()
    killed = emulator.service_pids
    assert len(killed) == 2
    emulator.kill_services()
    await_replaced(emulator)
    assert not set(killed) & set(emulator.service_pids)
    await put(emulator.connection_string, "after")
    assert await get(emulator.connection_string, "after") == BODY
    assert "service died, restarting it" in emulator.log.read_text()
    assert emulator.stop() == 0


def test_killed_emulator_leaves_no_service_behind(emulator: EmulatorProcess) -> None:
    emulator.start()
    services = emulator.service_pids
    emulator.kill()
    deadline = time.monotonic() + 5
    while alive(services):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_kill_and_restart_in_process(tmp_path: Path) -> None:
    async with Azurite(storage(tmp_path)) as azurite:
        await put(azurite.connection_string, "old")
        first = azurite.pids
        await azurite.restart()
        second = azurite.pids
        assert not set(first) & set(second)
        assert await get(azurite.connection_string, "old") == BODY
        await azurite.kill()
        assert not set(second) & set(azurite.pids)
        assert azurite.restarts == 4
        last = azurite.pids
    assert not alive(last)


async def test_second_emulator_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    config = storage(tmp_path)
    async with Azurite(config):
        ports = dict(zip(("blob_port", "queue_port"), free_ports(2), strict=True))
        with pytest.raises(ConfigError, match="in use by another emulator"):
            async with Azurite(config.model_copy(update=ports)):
                pass


async def test_tls_endpoint_answers(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    tls = Tls(certificate=certificate, key=key)
    async with (
        Azurite(storage(tmp_path, tls=tls)) as azurite,
        BlobServiceClient.from_connection_string(
            azurite.connection_string,
            api_version=AZURITE_API_VERSION,
            connection_verify=certificate,
        ) as client,
    ):
        assert azurite.connection_string.startswith("DefaultEndpointsProtocol=https")
        await client.create_container("tls")


@pytest.mark.parametrize("kind", ["blob", "queue"])
def test_taken_port_is_a_config_error_with_a_hint(emulator: EmulatorProcess, kind: str) -> None:
    port = emulator.blob_port if kind == "blob" else emulator.queue_port
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        done = run(emulator.config)
    assert done.returncode == 2
    assert f"azurite {kind} cannot listen on 127.0.0.1:{port}: the port is in use" in done.stderr
    assert "ss -ltnp" in done.stderr
    assert "Traceback" not in done.stderr
    await_closed(emulator.queue_port if kind == "blob" else emulator.blob_port)


def test_signal_during_start_stops_it(emulator: EmulatorProcess) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "azure_emu", "--config", str(emulator.config)],
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 90
        while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


def run(config: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "azure_emu", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def alive(pids: tuple[int, ...]) -> list[int]:
    return [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def await_replaced(emulator: EmulatorProcess) -> None:
    deadline = time.monotonic() + 30
    while emulator.log.read_text().count("service ready") < 4:
        assert time.monotonic() < deadline, emulator.log.read_text()
        time.sleep(0.05)


def make_certificate(folder: Path) -> tuple[str, str]:
    certificate, key = f"{folder}/cert.pem", f"{folder}/key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    command += " -subj /CN=cache -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    return certificate, key


def state(port: int) -> str:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            return str(json.load(answer)["state"])
    except urllib.error.HTTPError as error:
        return str(json.load(error)["state"])


def await_state(port: int, wanted: str) -> None:
    deadline = time.monotonic() + 30
    while state(port) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.05)

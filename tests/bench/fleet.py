"""Many agents as the config server sees them: each with its certificate, a long poll and reports.

As a program it is the agents: ``python -m tests.bench.fleet FOLDER PORT COUNT SETTLE SECONDS``
says "steady" SETTLE seconds after all have connected, and SECONDS later what each report took.
"""

import asyncio
import contextlib
import datetime as dt
import json
import os
import random
import ssl
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from appliance.config_server.config import ConfigServerConfig
from appliance.config_server.identity.identity import IDENTITY_FOLDER
from appliance.config_server.identity.keyring import open_keyring
from appliance.config_server.store.engine import open_database
from appliance.config_server.store.schema import (
    Certificate,
    Machine,
    Node,
    Policy,
    ProtectedDisk,
)
from daemon.certificates import (
    CLIENT,
    certificate_pem,
    key_digest,
    key_pem,
    new_key,
    serial_text,
    subject,
)
from replication.control.report import REPORT_SECONDS_DEFAULT, BlockDevice, MachineReport, Phase
from replication.control.role import NodeRole

POLL_SECONDS = 55
LIFETIME = dt.timedelta(days=90)
CONNECTING_AT_ONCE = 8


@dataclass(slots=True)
class Said:
    """What the fleet saw.

    heard:   agents that have both connections and an assignment.
    refused: answers that were not 200 or 204.
    """

    seconds: list[float]
    heard: int = 0
    refused: int = 0


async def make_fleet(config: ConfigServerConfig, folder: Path, count: int) -> None:
    """Enrol ``count`` agents in the database and protect their machines; no daemon runs yet.

    folder: there and empty; takes certificates and CA.
    """
    identity = os.path.join(config.state_folder, IDENTITY_FOLDER)
    async with open_database(config.database_url()) as database:
        keyring = await open_keyring(identity, config.identity.unlock_file, database)
        await asyncio.to_thread((folder / "ca.pem").write_text, keyring.ca_pem)
        now_ns = time.time_ns()
        async with database.writing() as session:
            policy = Policy(
                id=uuid.uuid4(),
                name="bench",
                kind="replication",
                rpo_threshold_seconds=900,
                retention_seconds=86400,
                crash_frequency_seconds=300,
                app_frequency_seconds=0,
                resync_window="always",
                created_ns=now_ns,
            )
            session.add(policy)
            await session.flush()
            for index in range(count):
                key = new_key()
                node = uuid.uuid4()
                certificate = keyring.ca.issue(
                    subject(str(node), NodeRole.MACHINE),
                    key.public_key(),
                    usages=[CLIENT],
                    lifetime=LIFETIME,
                )
                pem = certificate_pem(certificate) + key_pem(key)
                await asyncio.to_thread((folder / f"{index}.pem").write_bytes, pem)
                name = f"machine-{index}"
                session.add(Node(id=node, role=NodeRole.MACHINE, name=name, enrolled_ns=now_ns))
                await session.flush()
                session.add(
                    Certificate(
                        serial=serial_text(certificate.serial_number),
                        node_id=node,
                        key_digest=key_digest(key.public_key()),
                        issued_ns=now_ns,
                        expires_ns=now_ns + 90 * 86400 * 10**9,
                    )
                )
                session.add(
                    Machine(
                        id=node, name=name, policy_id=policy.id, state="protected", since_ns=now_ns
                    )
                )
                await session.flush()
                session.add_all(
                    ProtectedDisk(
                        machine_id=node,
                        index=disk,
                        device_id=f"wwn-{index}-{disk}",
                        device=f"/dev/sd{'abc'[disk]}",
                        name=f"sd{'abc'[disk]}",
                        size_bytes=64 << 30,
                    )
                    for disk in range(2)
                )


def _report(started_ns: int, assignment: int) -> bytes:
    now_ns = time.time_ns()
    return (
        MachineReport(
            software="bench",
            time_ns=now_ns,
            started_ns=started_ns,
            assignment=assignment,
            hostname="bench",
            devices=tuple(
                BlockDevice(id=f"wwn-{index}", device=f"/dev/sd{index}", size_bytes=64 << 30)
                for index in "abc"
            ),
            phase=Phase.REPLICATING,
            generation=1,
            committed=1000,
            durable_ns=now_ns - 4 * 10**9,
            restorable_ns=now_ns - 9 * 10**9,
            consistency="crash",
        )
        .model_dump_json()
        .encode()
    )


async def _agent(
    session: aiohttp.ClientSession, base: str, said: Said, turn: asyncio.Semaphore
) -> None:
    """One agent, for ever. The first report connects, and is not counted."""
    started_ns, version, first, second = time.time_ns(), 0, True, True
    poll: asyncio.Task[int] | None = None
    headers = {"content-type": "application/json"}

    async def ask(after: int) -> int:
        while True:
            url = f"{base}/node/assignment?after={after}&wait_seconds={POLL_SECONDS}"
            async with session.get(url) as answer:
                body = await answer.read()
                if answer.status == 200:
                    after = int(json.loads(body)["version"])
                elif answer.status != 204:
                    said.refused += 1
                    await asyncio.sleep(1)

    try:
        while True:
            body = _report(started_ns, version)
            began = time.monotonic()
            async with turn if first else contextlib.nullcontext():
                async with session.post(
                    f"{base}/node/reports", data=body, headers=headers
                ) as answer:
                    told = await answer.json()
                if first:
                    poll = asyncio.create_task(ask(0))
            if answer.status != 200:
                said.refused += 1
            else:
                version = int(told["assignment"])
                if not first:
                    said.seconds.append(time.monotonic() - began)
                    said.heard += second
                    second = False
            wait = REPORT_SECONDS_DEFAULT * (random.random() if first else 1)
            first = False
            await asyncio.sleep(wait)
    finally:
        if poll is not None:
            poll.cancel()


async def _run(folder: Path, port: int, count: int, settle_seconds: float, seconds: float) -> None:
    said = Said([])
    turn = asyncio.Semaphore(CONNECTING_AT_ONCE)
    base = f"https://localhost:{port}/api/v1"
    async with contextlib.AsyncExitStack() as stack:
        agents = []
        for index in range(count):
            context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
            context.load_cert_chain(folder / f"{index}.pem")
            connector = aiohttp.TCPConnector(ssl=context, keepalive_timeout=60)
            session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
            agents.append(asyncio.create_task(_agent(session, base, said, turn)))
        while said.heard < count:
            failed = next((agent for agent in agents if agent.done()), None)
            if failed is not None:
                await failed
            await asyncio.sleep(0.2)
        await asyncio.sleep(settle_seconds)
        _tell("steady")
        said.seconds.clear()
        await asyncio.sleep(seconds)
        _tell(json.dumps({"seconds": said.seconds, "refused": said.refused}))
        for agent in agents:
            agent.cancel()
        await asyncio.gather(*agents, return_exceptions=True)


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    folder, port, count, settle_seconds, seconds = sys.argv[1:]
    run = _run(Path(folder), int(port), int(count), float(settle_seconds), float(seconds))
    asyncio.run(run)
    return 0


if __name__ == "__main__":
    sys.exit(main())

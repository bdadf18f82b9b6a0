import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.heap import ARENAS_MAX
from daemon.service import UNEXPECTED_EXIT_CODE, Health

# A daemon whose behaviour is named by its first argument; it tells what it does on stdout.
DAEMON = """
import asyncio, sys
from prometheus_client import Counter
from daemon.service import Service, ServiceConfig, run_daemon
from replication import errors

async def serve(service: Service) -> None:
    what = sys.argv[1]
    if what == "defect":
        raise ZeroDivisionError
    if hasattr(errors, what):
        async with asyncio.TaskGroup() as group:
            group.create_task(fail(getattr(errors, what)))
    Counter("rounds", "Rounds.", registry=service.registry).inc(3)
    service.health.report("spool", warning="nearly full")
    if what == "critical":
        service.health.report("spool", critical="full")
    service.ready("for tests")
    print("ready", flush=True)
    await service.stop.wait()
    print("draining", flush=True)
    await asyncio.sleep(3600 if what == "stuck" else 0.05)
    print("drained", flush=True)

async def fail(error: type[errors.ReplicationError]) -> None:
    raise error("it went wrong", hint="do better")

port = int(sys.argv[2]) or None
sys.exit(run_daemon("tested", ServiceConfig(health_port=port, log_json=True), serve))
"""


class Daemon:
    def __init__(self, what: str, *, port: int = 0, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DAEMON, what, str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environ},
        )

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err


@pytest.fixture
def started() -> Iterator[list[Daemon]]:
    daemons: list[Daemon] = []
    yield daemons
    for daemon in daemons:
        daemon.process.kill()
        daemon.process.communicate()


def start(started: list[Daemon], what: str, *, port: int = 0, **environ: str) -> Daemon:
    started.append(Daemon(what, port=port, **environ))
    return started[-1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_drains(started: list[Daemon], signum: int) -> None:
    daemon = start(started, "fine")
    assert daemon.line() == "ready"
    daemon.process.send_signal(signum)
    code, out, err = daemon.end()
    assert (code, out) == (0, "draining\ndrained\n")
    assert "Traceback" not in err


def test_second_signal_ends_a_drain_that_is_stuck(started: list[Daemon]) -> None:
    daemon = start(started, "stuck")
    assert daemon.line() == "ready"
    daemon.process.terminate()
    assert daemon.line() == "draining"
    daemon.process.terminate()
    code, out, err = daemon.end()
    assert "drained" not in out
    assert "stopped before it was drained" in err
    assert code == 0


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("ConfigError", 2),
        ("PeerError", 3),
        ("UnavailableError", 4),
        ("StorageError", 5),
        ("IntegrityError", 6),
        ("defect", UNEXPECTED_EXIT_CODE),
    ],
)
def test_exit_code_tells_the_class_of_error(started: list[Daemon], what: str, code: int) -> None:
    found, out, err = start(started, what).end()
    assert (found, out) == (code, "")
    if what == "defect":
        assert "ZeroDivisionError" in err
        return
    told = json.loads(err.strip().splitlines()[-1])
    assert (told["event"], told["hint"]) == ("it went wrong", "do better")
    assert told["daemon"] == "tested"
    assert "Traceback" not in err


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(("what", "status"), [("fine", 200), ("critical", 503)])
def test_health_and_metrics_answer(started: list[Daemon], what: str, status: int) -> None:
    port = free_port()
    daemon = start(started, what, port=port)
    assert daemon.line() == "ready"
    deadline = time.monotonic() + 5
    while True:  # the port opens beside the service's own start
        try:
            found, body = get(f"http://127.0.0.1:{port}/healthz")
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert found == status
    health = json.loads(body)
    if what == "fine":
        assert health == {"state": "warning", "warnings": {"spool": "nearly full"}, "criticals": {}}
    else:
        assert health["state"] == "critical"
    assert "rounds_total 3.0" in get(f"http://127.0.0.1:{port}/metrics")[1]


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_of_life_and_end(
    started: list[Daemon], tmp_path: Path, abstract: bool
) -> None:
    name = f"@understudy-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(name.replace("@", "\0") if abstract else name)
        channel.settimeout(5)
        daemon = start(started, "fine", NOTIFY_SOCKET=name, WATCHDOG_USEC="100000")
        seen = [channel.recv(100) for _ in range(6)]
        assert seen.count(b"READY=1") == 1
        assert seen.count(b"WATCHDOG=1") == 5
        daemon.process.terminate()
        while channel.recv(100) != b"STOPPING=1":
            pass
    assert daemon.end()[0] == 0


def test_absent_systemd_is_no_error(started: list[Daemon], tmp_path: Path) -> None:
    daemon = start(started, "fine", NOTIFY_SOCKET=str(tmp_path / "gone"))
    assert daemon.line() == "ready"
    daemon.process.terminate()
    assert daemon.end()[0] == 0


def test_worst_report_is_the_state_and_it_can_be_taken_back() -> None:
    health = Health()
    assert health.state == "normal"
    health.report("a", warning="w")
    health.report("b", critical="c")
    assert health.state == "critical"
    health.report("b")
    assert health.state == "warning"
    health.report("a")
    assert (health.state, health.warnings, health.criticals) == ("normal", {}, {})


ARENAS = """
import asyncio, ctypes, sys, threading
from daemon.service import Service, ServiceConfig, run_daemon

async def serve(service: Service) -> None:
    met = threading.Barrier(8)

    def take() -> None:
        met.wait()
        kept = [bytes(65536 + n) for n in range(50)]
        met.wait()

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.fclose.argtypes = [ctypes.c_void_p]
    file = libc.fopen(sys.argv[1].encode(), b"w")
    libc.malloc_info(0, file)
    libc.fclose(file)

sys.exit(run_daemon("tested", ServiceConfig(), serve))
"""


def test_the_heap_of_a_daemon_has_few_arenas(tmp_path: Path) -> None:
    told = tmp_path / "heap.xml"
    command = [sys.executable, "-c", ARENAS, str(told)]
    assert subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0
    assert 1 <= told.read_text().count("<heap nr=") <= ARENAS_MAX

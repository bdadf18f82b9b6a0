"""One child process that is kept running: started, probed, restarted, stopped.

A child dies with its parent (PR_SET_PDEATHSIG through setpriv), so that no orphan holds a port or
a data folder. What it prints is kept to the last lines, for the error that tells why it died.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NoReturn

import structlog

from replication.errors import ConfigError, ReplicationError, UnavailableError

READY_SECONDS_MAX = 60.0
PROBE_INTERVAL_SECONDS = 0.05
BACKOFF_SECONDS_MIN = 0.2
BACKOFF_SECONDS_MAX = 10.0
STEADY_SECONDS = 30.0
STOP_SECONDS_MAX = 8.0
OUTPUT_LINES_MAX = 20
OUTPUT_LINE_BYTES_MAX = 16384

_log = structlog.get_logger()


class Supervised:
    """A service in a child process.

    probe: returns True once the service answers as it should; may raise ConfigError when what
           answers is not ours. Called every 50 ms while the service comes up.
    prepare: called before each start, also of a restart: what the child reads is written then.
    hear:    called with each line that the child prints.
    """

    def __init__(
        self,
        name: str,
        address: tuple[str, int],
        command: Sequence[str],
        environment: Mapping[str, str],
        probe: Callable[[], Awaitable[bool]],
        *,
        prepare: Callable[[], Awaitable[None]] | None = None,
        hear: Callable[[str], None] | None = None,
    ) -> None:
        self.name = name
        self._address = address
        self._command = ("setpriv", "--pdeathsig", "KILL", "--", *command)
        self._environment = environment
        self._probe = probe
        self._prepare = prepare
        self._hear = hear
        self._process: asyncio.subprocess.Process | None = None
        self._output: deque[str] = deque(maxlen=OUTPUT_LINES_MAX)
        self._reader: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._planned_exit = False
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is none."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def is_ready(self) -> bool:
        """Whether the service answered when it was last looked at, and has not died since."""
        return self._ready.is_set()

    async def start(self) -> None:
        """Start the child and wait until it answers.

        Raises ConfigError when its port is in use, UnavailableError when it dies or stays mute.
        """
        refuse_taken_port(self.name, self._address)
        if self._prepare is not None:
            await self._prepare()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=self._environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=OUTPUT_LINE_BYTES_MAX,
            start_new_session=True,
        )
        self._output.clear()
        self._reader = asyncio.create_task(self._read_output(self._process))
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                while not await self._probe():
                    if self._process.returncode is not None:
                        await self._tell_death()
                    await asyncio.sleep(PROBE_INTERVAL_SECONDS)
            if self._process.returncode is not None:
                await self._tell_death()  # what answered is somebody else's
        except TimeoutError as error:
            await self._kill()
            raise UnavailableError(
                f"{self.name} did not answer on {self._where} within {READY_SECONDS_MAX:.0f} s"
            ) from error
        except BaseException:
            await self._kill()
            raise
        self._ready.set()
        _log.info("service ready", service=self.name, pid=self._process.pid, address=self._where)

    async def supervise(self) -> None:
        """Restart the child whenever it dies; return after ``stop``."""
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._stopping.is_set():
            assert self._process is not None
            since = loop.time()
            code = await self._process.wait()
            self._ready.clear()
            if self._stopping.is_set():
                return
            planned, self._planned_exit = self._planned_exit, False
            failures = 0 if planned or loop.time() - since > STEADY_SECONDS else failures + 1
            if not planned:
                delay = min(BACKOFF_SECONDS_MIN * 2 ** min(failures - 1, 10), BACKOFF_SECONDS_MAX)
                _log.warning(
                    "service died, restarting it",
                    service=self.name,
                    exit_code=code,
                    wait_seconds=round(max(delay, 0.0), 1),
                    output="\n".join(self._output),
                )
                await asyncio.sleep(delay)
            while not self._stopping.is_set():
                try:
                    await self.start()
                    self.restarts += 1
                    break
                except ReplicationError as error:
                    failures += 1
                    _log.warning("service does not come up", service=self.name, reason=str(error))
                    await asyncio.sleep(
                        min(BACKOFF_SECONDS_MIN * 2 ** min(failures, 10), BACKOFF_SECONDS_MAX)
                    )

    async def wait_ready(self) -> None:
        """Return when the service answers."""
        await self._ready.wait()

    def kill(self) -> None:
        """SIGKILL the child, as a crash would; supervision restarts it."""
        self._ready.clear()
        self._signal(signal.SIGKILL)

    def restart(self) -> None:
        """Ask the child to end in good order; supervision starts it again at once."""
        self._ready.clear()
        self._planned_exit = True
        self._signal(signal.SIGTERM)

    async def stop(self) -> None:
        """SIGTERM, then SIGKILL after STOP_SECONDS_MAX; the child is gone on return."""
        self._stopping.set()
        self._ready.clear()
        process = self._process
        if process is None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS_MAX):
                await process.wait()
        except TimeoutError:
            _log.warning("service did not stop in time, killing it", service=self.name)
        finally:
            await self._kill()

    @property
    def _where(self) -> str:
        return f"{self._address[0]}:{self._address[1]}"

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
        if self._reader is not None:
            await self._reader

    async def _read_output(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:
                continue  # a line above the limit: its beginning is dropped
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            self._output.append(text)
            if self._hear is not None:
                self._hear(text)

    async def _tell_death(self) -> NoReturn:
        if self._reader is not None:
            await self._reader
        said = "\n".join(self._output) or "(nothing)"
        if "EADDRINUSE" in said:
            raise _port_taken(self.name, self._where)
        code = self._process.returncode if self._process is not None else None
        raise UnavailableError(f"{self.name} ended at start with exit code {code}: {said}")


def refuse_taken_port(name: str, address: tuple[str, int]) -> None:
    """Raise ConfigError when ``name`` could not listen on ``address``."""
    where = f"{address[0]}:{address[1]}"
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _port_taken(name, where) from error
            raise ConfigError(
                f"{name} cannot listen on {where}: {error.strerror or error}",
                hint="host must be an address of this machine; ports below 1024 need root",
            ) from error


def _port_taken(name: str, where: str) -> ConfigError:
    port = where.rpartition(":")[2]
    return ConfigError(
        f"{name} cannot listen on {where}: the port is in use",
        hint=f"see who holds it (ss -ltnp 'sport = :{port}'), end it or choose another port",
    )


def child_environment(**extra: str) -> dict[str, str]:
    """This process' environment without other daemons' secrets, and ``extra``."""
    kept = {name: value for name, value in os.environ.items() if not _ours(name)}
    return kept | extra


def _ours(name: str) -> bool:
    return name.startswith(("AZURITE_", "UNDERSTUDY_"))

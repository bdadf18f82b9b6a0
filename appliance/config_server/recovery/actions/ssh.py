"""Scripts over SSH. The host's key must be known, the user proves a key; nothing else is tried.

Neither this daemon's own SSH configuration nor an agent is used. At the end of an action its
connection ends, and with it the session: what the server does to the processes of a session whose
connection is gone is the server's.

Source: RFC 4252, RFC 4254 §6.5, §6.9; docs/adr/0015-asyncssh-for-actions.md.
"""

import contextlib
from dataclasses import dataclass

import asyncssh

from appliance.config_server.recovery.actions.tail import Tail
from replication.errors import AccessError, ConfigError, UnavailableError

READ_BYTES = 64 << 10
WINDOW_BYTES = 1 << 20
"""What a server may send before it is read."""

LOGIN_SECONDS_MAX = 30.0
SIGNALS = {"HUP": 1, "INT": 2, "QUIT": 3, "KILL": 9, "PIPE": 13, "ALRM": 14, "TERM": 15}


@dataclass(frozen=True, slots=True)
class Place:
    """Where, as whom. key_file, known_hosts: paths of files that were found to be trusted."""

    host: str
    port: int
    user: str
    key_file: str
    known_hosts: str


async def run_ssh(place: Place, command: str, *, stdin: bytes, output: Tail) -> int:
    """Run a command and return its exit code, negative for a signal.

    Raises ConfigError for a key that cannot be read, AccessError when one side does not trust the
    other, UnavailableError when the connection cannot be made or breaks.
    """
    try:
        known = asyncssh.read_known_hosts(place.known_hosts)
        keys = [asyncssh.read_private_key(place.key_file)]
    except (OSError, ValueError, asyncssh.Error) as error:
        raise ConfigError(f"a file for SSH cannot be used: {_reason(error)}") from error
    where = f"{place.user}@{place.host}:{place.port}"
    try:
        async with asyncssh.connect(
            place.host,
            place.port,
            username=place.user,
            client_keys=keys,
            known_hosts=known,
            config=None,
            agent_path=None,
            agent_forwarding=False,
            preferred_auth=("publickey",),
            login_timeout=LOGIN_SECONDS_MAX,
            connect_timeout=LOGIN_SECONDS_MAX,
        ) as connection:
            try:
                return await _command(connection, command, stdin, output)
            finally:
                connection.abort()  # a polite end could wait for the server for ever
    except asyncssh.HostKeyNotVerifiable as error:
        raise AccessError(
            f"{where}: the host's key is not the one in {place.known_hosts}",
            hint="compare its fingerprint on the host's own console, then put it there",
        ) from error
    except asyncssh.PermissionDenied as error:
        raise AccessError(f"{where} does not let the key {place.key_file} in") from error
    except (OSError, asyncssh.Error) as error:
        raise UnavailableError(f"{where}: {_reason(error)}") from error


async def _command(
    connection: asyncssh.SSHClientConnection, command: str, stdin: bytes, output: Tail
) -> int:
    process = await connection.create_process(
        command, stderr=asyncssh.STDOUT, encoding=None, window=WINDOW_BYTES
    )
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(stdin)
            process.stdin.write_eof()
        while part := await process.stdout.read(READ_BYTES):
            output.take(part)
        await process.wait_closed()
    except BaseException:
        with contextlib.suppress(OSError, asyncssh.Error):
            process.kill()
        raise
    if process.exit_signal is not None:
        return -SIGNALS.get(process.exit_signal[0], 1)
    if process.exit_status is None:
        raise UnavailableError("the connection ended before the command did")
    return process.exit_status


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", "") or getattr(error, "strerror", "") or str(error)
    return str(reason) or type(error).__name__

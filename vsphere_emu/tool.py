"""The system's tools (losetup, mkfs, mount …): run, or an error that quotes them."""

import os
import subprocess
from collections.abc import Mapping, Sequence

from replication.errors import ConfigError, StorageError

TOOL_SECONDS_MAX = 300.0
OUTPUT_CHARACTERS_MAX = 2000


def run_tool(
    *command: str,
    timeout: float = TOOL_SECONDS_MAX,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run ``command`` and return what it printed. Raises StorageError with its output's tail."""
    done = try_tool(*command, timeout=timeout, environment=environment)
    if done.returncode != 0:
        raise StorageError(
            f"{' '.join(command)} failed with exit code {done.returncode}: {tail(done)}"
        )
    return done.stdout


def try_tool(
    *command: str,
    timeout: float = TOOL_SECONDS_MAX,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``command``; its exit code is the caller's to judge."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env={**os.environ, "PATH": path, "LC_ALL": "C", **(environment or {})},
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{command[0]} is not installed", hint="make setup") from error
    except subprocess.TimeoutExpired as error:
        raise StorageError(f"{' '.join(command)} did not end within {timeout:.0f} s") from error


def tail(done: subprocess.CompletedProcess[str]) -> str:
    """The end of what a tool printed."""
    return _last((done.stdout, done.stderr))


def _last(parts: Sequence[str]) -> str:
    text = "\n".join(part.strip() for part in parts if part.strip())
    return text[-OUTPUT_CHARACTERS_MAX:] or "(it printed nothing)"

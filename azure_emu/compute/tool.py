"""Programs of the system that the compute node runs: bounded, heard, and ended with it."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from replication.errors import ConfigError, StorageError, UnavailableError

SECONDS_MAX = 60.0
WORDS_MAX = 600
"""Characters shown of what a program said."""


async def run_tool(*command: str, seconds_max: float | None = SECONDS_MAX) -> bytes:
    """Standard output. The program ends with this process, also when that is killed.

    Raises StorageError with the program's last words, UnavailableError when it takes longer than
    ``seconds_max``, ConfigError when it is not installed.
    """
    code, out, err = await try_tool(*command, seconds_max=seconds_max)
    if code != 0:
        said = (err or out).decode(errors="replace").strip()[-WORDS_MAX:]
        raise StorageError(f"{_shown(command)} … failed with exit code {code}: {said}")
    return out


async def try_tool(
    *command: str, seconds_max: float | None = SECONDS_MAX
) -> tuple[int, bytes, bytes]:
    """Exit code, standard output and error; raises as `run_tool` does but for the code."""
    try:
        process = await asyncio.create_subprocess_exec(
            *dying_with_us(command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{error.filename} is not installed", hint="deploy/setup") from error
    try:
        async with asyncio.timeout(seconds_max):
            out, err = await process.communicate()
    except TimeoutError as error:
        raise UnavailableError(f"{_shown(command)} did not end in {seconds_max:.0f} s") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, out, err


async def any_line(command: Sequence[str], holds: Callable[[bytes], bool]) -> bool:
    """Whether that holds of a line that the program says, however many these are.

    Raises StorageError when it fails.
    """
    process = await asyncio.create_subprocess_exec(
        *dying_with_us(command),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async for line in process.stdout:
            if holds(line):
                return True
        code = await process.wait()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if code != 0:
        raise StorageError(f"{_shown(command)} … failed with exit code {code}")
    return False


def _shown(command: Sequence[str]) -> str:
    """How the program itself begins, whatever it is run by."""
    own = command[command.index("--") + 1 :] if "--" in command else command
    return " ".join(own[:3])


def dying_with_us(command: Sequence[str]) -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", "--", *command]

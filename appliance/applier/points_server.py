"""The process that serves recovery points as files, apart from the one that applies.

A reader that stalls the file system stalls that process alone. It is started again when it ends.
"""

import asyncio
import contextlib
import os
import sys

from appliance.applier.config import ApplierConfig
from daemon.service import Health

RESTART_SECONDS_MIN = 1.0
RESTART_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 5.0
_PART = "points mount"
_PROGRAM = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: no mount outlives its applier
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
from appliance.applier.points_fuse import serve_points
from daemon.log import configure_log
from daemon.service import fail
from replication.errors import ReplicationError
configure_log(daemon="points")
try:
    serve_points(sys.argv[2], sys.argv[3], for_root=sys.argv[4] == "for-root")
except ReplicationError as error:
    sys.exit(fail(error))
"""


async def serve_points_apart(config: ApplierConfig, health: Health) -> None:
    """Keep the recovery points mounted until cancelled."""
    assert config.points_mount is not None
    wait = RESTART_SECONDS_MIN
    while True:
        started = asyncio.get_running_loop().time()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            _PROGRAM,
            str(os.getpid()),
            config.store,
            config.points_mount,
            "for-root" if config.points_for_root else "alone",
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        health.report(_PART)
        try:
            code = await process.wait()
        finally:
            await _end(process)
        if asyncio.get_running_loop().time() - started > RESTART_SECONDS_MAX:
            wait = RESTART_SECONDS_MIN
        health.report(_PART, warning=f"it ended with code {code}; it starts again in {wait:.0f} s")
        await asyncio.sleep(wait)
        wait = min(2 * wait, RESTART_SECONDS_MAX)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_SECONDS_MAX)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

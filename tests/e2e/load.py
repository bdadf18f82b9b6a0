"""Programs that change disks while a test goes on."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.part import ROOT

STOP_SECONDS_MAX = 30.0


@contextlib.contextmanager
def churning(
    kind: str, target: str | Path, *, seed: int = 1, per_second: int = 200
) -> Iterator[None]:
    """Random changes of a ``device`` or of ``files`` in a folder; all flushed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.churn", kind, str(target), str(seed), str(per_second)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield
        assert process.poll() is None, f"the churn ended: {process.communicate()[1]}"
        process.terminate()
        _, said = process.communicate(timeout=STOP_SECONDS_MAX)
        assert process.returncode == 0, f"the churn failed: {said}"
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()

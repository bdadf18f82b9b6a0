from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.azure_emu.fixtures import EmulatorProcess, azurite

__all__ = ["azurite"]


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[EmulatorProcess]:
    """An emulator of the test's own, not started."""
    emulator = EmulatorProcess(tmp_path)
    try:
        yield emulator
    finally:
        emulator.kill()

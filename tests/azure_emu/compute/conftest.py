from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.azure_emu.compute.site import Place


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    place = Place(tmp_path / "site")
    try:
        yield place
    finally:
        await place.clear()

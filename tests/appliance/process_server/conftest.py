from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.appliance.process_server.rig import Certificates, ProcessServer
from tests.azure_emu.fixtures import EmulatorProcess, azurite

__all__ = ["azurite"]


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, certificates: Certificates, azurite: EmulatorProcess
) -> Iterator[ProcessServer]:
    """One server for all tests of a module; each uses a machine of its own."""
    folder = tmp_path_factory.mktemp("process_server")
    server = ProcessServer(
        folder,
        certificates,
        azurite.connection_string,
        limits="body_grace_seconds = 1.0\nheader_seconds_max = 2.0",
    )
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture
def own_server(
    tmp_path: Path, certificates: Certificates, azurite: EmulatorProcess
) -> Iterator[ProcessServer]:
    """A server of the test's own, not started."""
    server = ProcessServer(tmp_path, certificates, azurite.connection_string)
    try:
        yield server
    finally:
        server.kill()

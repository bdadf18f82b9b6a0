from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vsphere_emu.fixtures import make_vcenter  # noqa: F401
from vsphere_emu.config import GuestConfig
from vsphere_emu.datastore import Datastore
from vsphere_emu.guest import Guest

MakeGuest = Callable[..., Guest]


@pytest.fixture
def make_guest(tmp_path: Path) -> Iterator[MakeGuest]:
    """Builds guests from the keys of their configuration; nothing of them is left afterwards."""
    datastore = Datastore("datastore1", str(tmp_path / "store"))
    made: list[Guest] = []

    def make(**config: object) -> Guest:
        guest = Guest(GuestConfig.model_validate(config), datastore, str(tmp_path / "root"))
        made.append(guest)
        return guest

    try:
        yield make
    finally:
        for guest in made:
            guest.remove_all_traces(delete_disks=True)


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended may wait for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

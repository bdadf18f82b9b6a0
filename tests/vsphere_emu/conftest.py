import subprocess
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


@pytest.fixture(scope="session")
def parted_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk image of 32 MiB with one partition, which holds an ext4 with the file ``seed``."""
    folder = tmp_path_factory.mktemp("image")
    image, content = folder / "parted.img", folder / "content"
    content.mkdir()
    (content / "seed").write_text("from the image")
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    made = ["mkpart", "primary", "ext4", "1MiB", "100%"]
    subprocess.run(["parted", "-s", image, "mklabel", "msdos", *made], check=True)
    options = ["-E", "offset=1048576,lazy_itable_init=0", "-d", str(content)]
    subprocess.run(["mkfs.ext4", "-q", "-F", "-b", "4096", *options, image, "31m"], check=True)
    return image


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended may wait for its parent to look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

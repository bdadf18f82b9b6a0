"""Building images: the real one, and small ones whose Debian is a stand-in, built in a second."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from replication.errors import ConfigError, StorageError
from vsphere_emu import block_device
from vsphere_emu.image.__main__ import main
from vsphere_emu.image.builder import (
    CACHE_VARIABLE,
    IMAGES_KEPT_MAX,
    cache_folder,
    cached_path,
    copy_image,
    default_recipe,
    ensure_image,
    with_script,
)
from vsphere_emu.image.recipe import PARTITION_OFFSET_BYTES, File, Recipe

MIB = 1 << 20
BUILD_SECONDS_MAX = 1800
SMALL = Recipe(
    packages=("understudy",),
    size_bytes=48 * MIB,
    files=(File("/etc/hostname", "small\n"), File("/usr/bin/tool", "#!/bin/sh\n", 0o755)),
    enabled=(),
    masked=(),
    trimmed=("usr/share/doc/*",),
)
DEBOOTSTRAP = """\
#!/bin/bash
set -e
root=${@: -2:1}
echo $$ >>"$STAND_IN/runs"
[ ! -e "$STAND_IN/broken" ] || { echo "E: no such archive"; exit 1; }
mkdir -p "$root"/{boot,etc,usr/bin,usr/share/doc/x}
echo kernel >"$root/boot/vmlinuz-1.2-cloud"
echo initrd >"$root/boot/initrd.img-1.2-cloud"
echo other >"$root/etc/hostname"
"""
HANGING = """\
#!/bin/sh
touch "$STAND_IN/mounted"
sleep 1000
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in front on PATH: its debootstrap makes a Debian of four files."""
    folder = tmp_path / "bin"
    folder.mkdir()
    put(folder / "debootstrap", DEBOOTSTRAP)
    put(folder / "chroot", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(tmp_path))
    return tmp_path


def put(path: Path, script: str) -> None:
    path.write_text(script)
    path.chmod(0o755)


def runs(stand_in: Path) -> int:
    return len((stand_in / "runs").read_text().splitlines())


def debugfs(image: Path | str, request: str) -> str:
    place = f"{image}?offset={PARTITION_OFFSET_BYTES}"
    done = subprocess.run(
        ["debugfs", "-R", request, place], check=True, capture_output=True, text=True
    )
    return done.stdout


def assert_boots_by_extlinux(image: str, kernel: str) -> None:
    """A boot sector, one active partition at 1 MiB, a clean ext4 with the boot loader's files."""
    with open(image, "rb") as file:
        sector = file.read(512)
        file.seek(PARTITION_OFFSET_BYTES)
        loader = file.read(512)
    assert sector[510:] == b"\x55\xaa"
    assert any(sector[:440])
    assert sector[446] == 0x80
    assert sector[450] == 0x83
    assert int.from_bytes(sector[454:458], "little") * 512 == PARTITION_OFFSET_BYTES
    assert b"SYSLINUX" in loader
    listed = debugfs(image, "ls -p /boot/extlinux")
    assert {"ldlinux.sys", "ldlinux.c32", "extlinux.conf"} <= set(listed.split("/"))
    told = debugfs(image, "cat /boot/extlinux/extlinux.conf")
    assert f"LINUX /boot/vmlinuz-{kernel}" in told
    assert "console=ttyS0,115200" in told
    for name in ("vmlinuz", "initrd.img"):
        assert "Inode:" in debugfs(image, f"stat /boot/{name}-{kernel}")
    place = f"{image}?offset={PARTITION_OFFSET_BYTES}"
    subprocess.run(["e2fsck", "-fn", place], check=True, capture_output=True)


@pytest.mark.timeout(BUILD_SECONDS_MAX)
def test_real_image_is_a_disk_that_boots() -> None:
    """Builds it where no cache has it; several runs at once build it once."""
    image = ensure_image(default_recipe(), cache_folder())
    kernels = [
        name for name in debugfs(image, "ls -p /boot").split("/") if name.startswith("vmlinuz-")
    ]
    assert len(kernels) == 1
    assert kernels[0].endswith("-cloud-amd64")
    assert_boots_by_extlinux(image, kernels[0].removeprefix("vmlinuz-"))
    assert debugfs(image, "cat /etc/hostname") == "boot-01\n"
    assert "Type: symlink" in debugfs(
        image, "stat /etc/systemd/system/sockets.target.wants/understudy-service.socket"
    )
    found = os.stat(image)
    assert found.st_size == default_recipe().size_bytes
    assert found.st_blocks * 512 < 400 * MIB


def test_small_image_has_what_the_recipe_says(stand_in: Path) -> None:
    cache = str(stand_in / "cache")
    image = ensure_image(with_script(SMALL), cache, mirror="http://mirror.invalid")
    assert image == cached_path(with_script(SMALL), cache)
    assert_boots_by_extlinux(image, "1.2-cloud")
    assert debugfs(image, "cat /etc/hostname") == "small\n"
    assert "Mode:  0755" in debugfs(image, "stat /usr/bin/tool")
    assert "Mode:  0444" in debugfs(image, "stat /etc/machine-id")
    assert debugfs(image, "ls -p /usr/share/doc").count("/040755/") == 2  # itself and its parent
    assert ensure_image(with_script(SMALL), cache) == image
    assert runs(stand_in) == 1
    ensure_image(with_script(SMALL), cache, mirror="http://mirror.invalid", fresh=True)
    assert runs(stand_in) == 2
    assert sorted(os.listdir(cache)) == [os.path.basename(image), "lock"]


def test_many_at_once_build_one(stand_in: Path) -> None:
    cache = str(stand_in / "cache")
    told: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        made = {
            pool.submit(
                ensure_image, with_script(SMALL), cache, mirror="http://m.invalid", tell=told.append
            )
            for _ in range(4)
        }
    assert {one.result() for one in made} == {cached_path(with_script(SMALL), cache)}
    assert runs(stand_in) == 1


def test_builder_killed_at_its_mount_leaves_nothing(stand_in: Path) -> None:
    cache = stand_in / "cache"
    put(stand_in / "bin" / "extlinux", HANGING)
    code = (
        "from tests.vsphere_emu.image.test_builder import *\n"
        f"ensure_image(with_script(SMALL), {str(cache)!r}, mirror='http://m.invalid')"
    )
    builder = subprocess.Popen([sys.executable, "-c", code])
    try:
        wait_for((stand_in / "mounted").exists)
        work = next(cache.glob("building-*"))
        assert block_device.loops_of(str(work / "disk.img")) != ()
    finally:
        builder.send_signal(signal.SIGKILL)
        builder.wait()
    wait_for(lambda: block_device.loops_of(str(work / "disk.img")) == ())
    wait_for(lambda: not processes_of(str(work)))
    assert str(cache) not in Path("/proc/self/mountinfo").read_text()
    assert not Path(cached_path(with_script(SMALL), str(cache))).exists()

    (stand_in / "bin" / "extlinux").unlink()
    ensure_image(with_script(SMALL), str(cache), mirror="http://m.invalid")
    assert list(cache.glob("building-*")) == []


def processes_of(work: str) -> list[str]:
    """Processes that were told of the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"WORK={work}".encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def wait_for(holds: object) -> None:
    assert callable(holds)
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_failure_shows_the_end_of_what_was_printed(stand_in: Path) -> None:
    (stand_in / "broken").touch()
    cache = stand_in / "cache"
    with pytest.raises(StorageError, match="E: no such archive"):
        ensure_image(with_script(SMALL), str(cache), mirror="http://m.invalid")
    assert os.listdir(cache) == ["lock"]


def test_missing_tool_is_named(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vsphere_emu.image.builder.TOOLS", ("understudy-no-such-tool",))
    with pytest.raises(ConfigError, match="understudy-no-such-tool is not installed"):
        ensure_image(with_script(SMALL), str(stand_in / "cache"), mirror="http://m.invalid")


def test_images_used_last_are_kept(stand_in: Path) -> None:
    cache = stand_in / "cache"
    cache.mkdir()
    for number in range(IMAGES_KEPT_MAX + 2):
        old = cache / f"debian-{number:032}.img"
        old.touch()
        os.utime(old, (number, number))
    (cache / "other.img").touch()
    made = ensure_image(with_script(SMALL), str(cache), mirror="http://m.invalid")
    left = sorted(path.name for path in cache.glob("debian-*.img"))
    assert len(left) == IMAGES_KEPT_MAX
    assert os.path.basename(made) in left
    assert f"debian-{IMAGES_KEPT_MAX + 1:032}.img" in left
    assert (cache / "other.img").exists()


def test_copy_is_whole_sparse_and_ours(stand_in: Path) -> None:
    image = ensure_image(with_script(SMALL), str(stand_in / "cache"), mirror="http://m.invalid")
    copy = stand_in / "copy.img"
    copy_image(image, str(copy))
    assert copy.read_bytes() == Path(image).read_bytes()
    assert copy.stat().st_blocks <= os.stat(image).st_blocks + 16
    assert copy.stat().st_mode & 0o777 == 0o644
    with pytest.raises(StorageError, match="cannot write"):
        copy_image(image, str(stand_in / "none" / "copy.img"))
    with pytest.raises(StorageError):
        copy_image(str(stand_in / "gone.img"), str(copy))
    assert copy.read_bytes() == Path(image).read_bytes()
    assert not list(stand_in.glob(".copy*"))


def test_command_puts_the_image_where_it_is_asked_for(
    stand_in: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(stand_in / "cache"))
    cached = Path(cached_path(default_recipe(), cache_folder()))
    cached.parent.mkdir()
    cached.write_bytes(b"image")
    output = stand_in / "out.img"
    assert main(["build", str(output)]) == 0
    assert output.read_bytes() == b"image"
    assert main(["build"]) == 0
    assert capfd.readouterr().out == f"{output}\n{cached}\n"

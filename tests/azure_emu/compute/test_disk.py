# ruff: noqa: ASYNC220, ASYNC221, ASYNC240 - nothing else runs on this loop
import asyncio
import json
import subprocess
from pathlib import Path

import pytest

from azure_emu.compute import disk
from azure_emu.compute.disk import Disk, disks_of
from replication.control.recovery import SourceDisk
from replication.errors import ConflictError, InputError, StorageError

GIB = 1 << 30
SIZES = [512, 4096 + 512, (1 << 20) + 512, GIB + 3 * 512, 256 * GIB, 1024 * GIB]


def source(folder: Path, size_bytes: int, index: int = 0) -> Disk:
    points = folder / "points"
    points.mkdir(exist_ok=True)
    name = f"disk{index}.img"
    with (points / name).open("wb") as file:
        file.write(bytes([index + 1]) * 512)
        file.truncate(size_bytes)
    ordered = SourceDisk(index=index, name="d", size_bytes=size_bytes, source=name)
    (found,) = disks_of(str(folder / "vm"), str(points), [ordered])
    return found


def info(path: str) -> dict[str, object]:
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", path], check=True, capture_output=True
    ).stdout
    found = json.loads(told)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("size_bytes", SIZES)
async def test_a_disk_of_any_size_is_made_at_once_and_has_exactly_it(
    tmp_path: Path, size_bytes: int
) -> None:
    made = source(tmp_path, size_bytes)
    seconds = await disk.make_disks([made])
    assert seconds < 10  # see the benchmark for the figure
    assert info(made.path)["virtual-size"] == size_bytes
    assert info(made.path)["backing-filename"] == made.source
    assert disk.space_bytes([made]) < 8 << 20
    assert (await disk.read_head(made, 512)) == b"\x01" * 512


async def test_many_disks_are_made_together_and_those_that_are_there_stay(tmp_path: Path) -> None:
    made = [source(tmp_path, GIB, index) for index in range(12)]
    await disk.make_disks(made[:1])
    before = Path(made[0].path).stat().st_ino
    Path(made[1].path + ".new").write_bytes(b"half of a disk")
    await disk.make_disks(made)
    assert Path(made[0].path).stat().st_ino == before
    assert sorted(path.name for path in (tmp_path / "vm").iterdir()) == sorted(
        f"disk{index}.qcow2" for index in range(12)
    )


async def test_a_point_that_cannot_be_read_or_is_another_makes_no_disk(tmp_path: Path) -> None:
    made = source(tmp_path, 4096)
    with pytest.raises(StorageError, match="has 4096 bytes, not 8192"):
        await disk.make_disks([Disk(0, made.path, made.source, 8192)])
    Path(made.source).unlink()
    with pytest.raises(StorageError, match="No such file") as raised:
        await disk.make_disks([made])
    assert raised.value.hint
    assert not Path(made.path).exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", "."])
def test_a_source_outside_the_points_is_refused(tmp_path: Path, name: str) -> None:
    ordered = SourceDisk(index=0, name="d", size_bytes=512, source=name)
    with pytest.raises(InputError, match="is not below"):
        disks_of(str(tmp_path), str(tmp_path / "points"), [ordered])


@pytest.mark.parametrize("size_bytes", [0, 1, 511, 513])
def test_a_size_that_is_none_is_refused(tmp_path: Path, size_bytes: int) -> None:
    ordered = SourceDisk(index=0, name="d", size_bytes=size_bytes, source="x")
    with pytest.raises(InputError, match="a size of"):
        disks_of(str(tmp_path), str(tmp_path / "points"), [ordered])


def test_an_index_twice_is_refused(tmp_path: Path) -> None:
    ordered = SourceDisk(index=0, name="d", size_bytes=512, source="x")
    with pytest.raises(InputError, match="same index"):
        disks_of(str(tmp_path), str(tmp_path / "points"), [ordered, ordered])


async def test_a_disk_that_is_written_to_is_exported_made_to_stand_alone_and_kept(
    tmp_path: Path,
) -> None:
    made = source(tmp_path, 3 * (1 << 20) + 512)
    await disk.make_disks([made])
    write = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 4k", made.path]
    subprocess.run(write, check=True, capture_output=True)
    target = tmp_path / "out.raw"
    await disk.export(made, str(target))
    content = target.read_bytes()
    assert len(content) == made.size_bytes
    assert content[:512] == b"\x01" * 512
    assert content[1 << 20 : (1 << 20) + 4096] == b"\x07" * 4096
    assert Path(made.source).read_bytes()[1 << 20 : (1 << 20) + 4096] == b"\0" * 4096
    with pytest.raises(InputError, match="is there already"):
        await disk.export(made, str(target))

    assert not await disk.is_independent(made)
    with pytest.raises(ConflictError, match="stands on its point"):
        await disk.snapshot(made, "before")
    Path(made.path + ".new").write_bytes(b"half of a disk")
    await disk.make_independent(made)
    assert await disk.is_independent(made)
    assert not Path(made.path + ".new").exists()
    Path(made.source).unlink()
    again = tmp_path / "again.raw"
    await disk.export(made, str(again))
    assert again.read_bytes() == content

    await disk.snapshot(made, "before")
    with pytest.raises(InputError):
        await disk.snapshot(made, "-d")
    await disk.delete_snapshot(made, "before")
    with pytest.raises(StorageError):
        await disk.delete_snapshot(made, "before")


async def test_a_disk_with_snapshots_keeps_its_point(tmp_path: Path) -> None:
    made = source(tmp_path, 1 << 20)
    await disk.make_disks([made])
    keep = ["qemu-img", "snapshot", "-c", "before", made.path]
    subprocess.run(keep, check=True, capture_output=True)
    with pytest.raises(StorageError, match="keeps snapshots"):
        await disk.make_independent(made)
    assert not await disk.is_independent(made)


async def test_a_copy_that_is_ended_in_the_middle_leaves_the_disk_as_it_was(tmp_path: Path) -> None:
    made = source(tmp_path, 256 << 20)
    Path(made.source).write_bytes(b"x" * made.size_bytes)
    await disk.make_disks([made])
    before = Path(made.path).read_bytes()
    copying = asyncio.create_task(disk.make_independent(made))
    async with asyncio.timeout(60):
        while not Path(made.path + ".new").exists():  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.001)
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert Path(made.path).read_bytes() == before
    await disk.make_independent(made)
    compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", made.path, made.source]
    subprocess.run(compare, check=True, capture_output=True)


async def test_a_disk_in_use_is_not_exported(tmp_path: Path) -> None:
    made = source(tmp_path, 1 << 20)
    await disk.make_disks([made])
    holder = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", made.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"read 0 512\n")
        holder.stdin.flush()
        holder.stdout.readline()
        with pytest.raises(ConflictError, match="in use"):
            await disk.export(made, str(tmp_path / "out.raw"))
        assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("kind", ["backing file", "data file", "other format"])
async def test_a_disk_that_names_a_file_which_is_not_its_own_gives_nothing_of_it(
    tmp_path: Path, kind: str
) -> None:
    """As one that was written by whoever broke out of a VM."""
    made = source(tmp_path, 1 << 20)
    await disk.make_disks([made])
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret".ljust(1 << 20))
    if kind == "backing file":
        command = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(secret)]
        subprocess.run([*command, made.path], check=True)
    elif kind == "data file":
        options = f"data_file={secret},data_file_raw=on"
        command = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, made.path, "1M"]
        subprocess.run(command, check=True)
        secret.write_bytes(b"secret".ljust(1 << 20))
    else:
        extent = f'RW 2048 FLAT "{secret}" 0'
        Path(made.path).write_text(
            "# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n"
            f'createType="monolithicFlat"\n{extent}\n'
        )
    target = tmp_path / "target"
    for attempt in (
        disk.read_head(made, 512),
        disk.export(made, str(target)),
        disk.make_independent(made),
        disk.needs_source(made),
    ):
        with pytest.raises(StorageError):
            await attempt
    assert not target.exists()
    left = sorted(path.name for path in (tmp_path / "vm").iterdir())
    assert left == ["disk0.qcow2"]
    assert secret.read_bytes().startswith(b"secret")

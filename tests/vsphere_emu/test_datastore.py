import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replication.errors import ConfigError, StorageError
from vsphere_emu.datastore import Datastore, parse_descriptor, render_descriptor

MIB = 1 << 20


@pytest.fixture
def datastore(tmp_path: Path) -> Datastore:
    return Datastore("datastore1", str(tmp_path / "store"))


def test_created_disk_is_sparse_and_opens_again(datastore: Datastore) -> None:
    made = datastore.create("[datastore1] web-01/web-01.vmdk", 64 * MIB)
    assert datastore.open("[datastore1] web-01/web-01.vmdk") == made
    found = os.stat(made.flat_path)
    assert (found.st_size, found.st_blocks) == (64 * MIB, 0)
    assert made.flat_path.endswith("/web-01/web-01-flat.vmdk")


def test_qemu_reads_the_disk(datastore: Datastore, tmp_path: Path) -> None:
    disk = datastore.create("[datastore1] vm/vm.vmdk", 8 * MIB)
    with open(disk.flat_path, "r+b") as file:
        file.seek(5 * MIB)
        file.write(b"to be or not to be")
    told = subprocess.run(
        ["qemu-img", "info", "--output=json", disk.descriptor_path],
        check=True,
        capture_output=True,
    ).stdout
    info = json.loads(told)
    assert (info["format"], info["virtual-size"]) == ("vmdk", 8 * MIB)
    assert info["format-specific"]["data"]["create-type"] == "vmfs"
    raw = tmp_path / "raw.img"
    command = ["qemu-img", "convert", "-f", "vmdk", "-O", "raw", disk.descriptor_path, str(raw)]
    subprocess.run(command, check=True)
    assert raw.read_bytes() == Path(disk.flat_path).read_bytes()


def test_disk_made_by_qemu_opens(datastore: Datastore) -> None:
    folder = Path(datastore.folder) / "vm"
    folder.mkdir(parents=True)
    options = ["-o", "subformat=monolithicFlat", f"{folder}/vm.vmdk", "16M"]
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", *options], check=True)
    disk = datastore.open("[datastore1] vm/vm.vmdk")
    assert disk.size_bytes == 16 * MIB
    assert disk.flat_path == f"{folder}/vm-flat.vmdk"


def test_list_names_disks_and_delete_leaves_nothing(datastore: Datastore) -> None:
    paths = ("[datastore1] a/data.vmdk", "[datastore1] a/log.vmdk", "[datastore1] b/b.vmdk")
    for path in paths:
        datastore.create(path, MIB)
    assert datastore.list() == paths
    for path in paths:
        datastore.delete(path)
        datastore.delete(path)
    assert datastore.list() == ()
    assert os.listdir(datastore.folder) == []


def test_create_does_not_overwrite(datastore: Datastore) -> None:
    datastore.create("[datastore1] a/a.vmdk", MIB)
    with pytest.raises(StorageError, match="exists already"):
        datastore.create("[datastore1] a/a.vmdk", MIB)


def test_create_takes_over_a_flat_file_that_a_crash_left(datastore: Datastore) -> None:
    folder = Path(datastore.folder) / "a"
    folder.mkdir(parents=True)
    (folder / "a-flat.vmdk").write_bytes(b"x" * 5000)
    assert not datastore.exists("[datastore1] a/a.vmdk")
    disk = datastore.create("[datastore1] a/a.vmdk", MIB)
    assert Path(disk.flat_path).read_bytes() == bytes(MIB)


def test_flat_file_of_another_size_is_refused(datastore: Datastore) -> None:
    disk = datastore.create("[datastore1] a/a.vmdk", MIB)
    os.truncate(disk.flat_path, MIB // 2)
    with pytest.raises(StorageError, match=r"says 1048576 bytes, but .* has 524288"):
        datastore.open(disk.datastore_path)


@pytest.mark.parametrize(
    "path",
    [
        "a/a.vmdk",
        "[other] a/a.vmdk",
        "[datastore1] ../a.vmdk",
        "[datastore1] a/../../a.vmdk",
        "[datastore1] /etc/a.vmdk",
        "[datastore1] a//a.vmdk",
        "[datastore1] a/a-flat.vmdk",
        "[datastore1] a/a.img",
    ],
)
def test_path_outside_the_datastore_is_refused(datastore: Datastore, path: str) -> None:
    with pytest.raises(ConfigError):
        datastore.create(path, MIB)


GOOD = render_descriptor("a-flat.vmdk", MIB)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "first line"),
        (b"KDMV\x01\0\0\0" + bytes(500), "first line"),
        (b"\xff\xfe", "not text"),
        (b"# Disk DescriptorFile\n" + b"#" * 70_000, "longer than"),
        (GOOD.replace('"vmfs"', '"streamOptimized"').encode(), "createType is streamOptimized"),
        (GOOD.replace("createType", "x").encode(), "createType is missing"),
        (GOOD.replace("RW 2048", "# RW 2048").encode(), "0 extents"),
        (GOOD.replace("RW 2048", 'RW 1 VMFS "b"\nRW 2048').encode(), "2 extents"),
        (GOOD.replace("VMFS", "SPARSE").encode(), "its extent is"),
        (GOOD.replace("a-flat.vmdk", "../a-flat.vmdk").encode(), "not beside it"),
        (GOOD.replace("RW 2048", "RW 0").encode(), "size is 0"),
        (GOOD.replace("RW 2048", "RW many").encode(), "means nothing"),
        (GOOD.replace("parentCID=ffffffff", "parentCID=1234abcd").encode(), "has a parent"),
    ],
)
def test_malformed_descriptor_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(StorageError, match=reason) as raised:
        parse_descriptor(content, "[datastore1] a/a.vmdk")
    assert "[datastore1] a/a.vmdk" in str(raised.value)


@given(
    st.integers(min_value=1, max_value=1 << 37),
    st.from_regex(r"[a-z0-9_. -]{1,40}", fullmatch=True),
)
def test_descriptor_is_read_as_written(sectors: int, name: str) -> None:
    text = render_descriptor(f"x{name}", sectors * 512)
    assert parse_descriptor(text.encode(), "here") == (f"x{name}", sectors * 512)


@given(st.binary(max_size=300), st.integers(min_value=0, max_value=len(GOOD)))
def test_any_bytes_give_a_disk_or_a_storage_error(noise: bytes, at: int) -> None:
    content = GOOD.encode()[:at] + noise + GOOD.encode()[at:]
    try:
        name, size_bytes = parse_descriptor(content, "here")
    except StorageError:
        return
    assert name
    assert size_bytes > 0

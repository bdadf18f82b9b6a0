import uuid
from pathlib import Path

import pytest

from azure_emu.compute.record import RECORD, VmFolder, VmRecord, find_folders
from replication.control.recovery import VirtualMachineOrder, VmCheck
from replication.errors import StorageError

VM = uuid.uuid4()
ORDER = VirtualMachineOrder(id=VM, name="web", machine=uuid.uuid4(), disks=(), network="test")


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = VmFolder(str(tmp_path), VM)
    assert folder.read() is None
    record = VmRecord(order=ORDER, started_ns=7, check=VmCheck(passed=True), nonce="n", starts=2)
    folder.write(record)
    assert folder.read() == record
    assert [found.vm for found in find_folders(str(tmp_path))] == [VM]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"order": 7}', "\xff"])
def test_a_damaged_record_is_told_and_nothing_is_removed(tmp_path: Path, content: str) -> None:
    folder = VmFolder(str(tmp_path), VM)
    folder.write(VmRecord(order=ORDER))
    Path(folder.file(RECORD)).write_text(content, encoding="latin-1")
    with pytest.raises(StorageError, match="cannot be read") as raised:
        folder.read()
    assert raised.value.hint
    assert Path(folder.path).exists()


def test_removing_takes_the_record_last_and_may_be_done_again(tmp_path: Path) -> None:
    folder = VmFolder(str(tmp_path), VM)
    folder.write(VmRecord(order=ORDER, removing=True))
    Path(folder.file("disk0.qcow2")).write_bytes(b"x")
    folder.remove()
    folder.remove()
    assert not Path(folder.path).exists()


def test_what_is_no_vm_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    assert find_folders(str(tmp_path)) == []

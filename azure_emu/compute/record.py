"""What is written down of a VM: its order and how far it has come, in a file of its own.

The file is replaced whole before a step is taken that must not be taken twice. What it does not
say is looked up: whether disks are there, whether a process runs.
"""

import contextlib
import os
import shutil
import uuid
from typing import Annotated

from pydantic import Field, ValidationError

from daemon.durable import make_folder, write_whole
from replication.control.message import Message
from replication.control.recovery import VirtualMachineOrder, VmCheck
from replication.control.value import Count, Seconds, Text
from replication.errors import StorageError

RECORD = "vm.json"


class VmRecord(Message):
    """order: the newest one that named the VM.

    removing:     it is to go; set before anything of it is deleted.
    guest:        ``own`` or ``recovery``, chosen at the first start.
    nonce:        of the boot that is under way or was the last.
    started_ns:   when this boot began; 0 while the VM is off.
    up_ns:        when a guest answered first.
    check:        of this boot; None while it is under way.
    failed:       why this boot came to nothing; power off, and on again, tries anew.
    starts:       so many in a row had no answer.
    evidence_due: console and screenshot are still to be sent.
    """

    order: VirtualMachineOrder
    removing: bool = False
    disks_ready_ns: Count = 0
    disks_seconds: Seconds = 0.0
    guest: Text = ""
    nonce: Text = ""
    started_ns: Count = 0
    up_ns: Count = 0
    check: VmCheck | None = None
    failed: Text = ""
    starts: Annotated[int, Field(ge=0)] = 0
    evidence_due: bool = False


class VmFolder:
    """A VM's folder: its record, its disks, its console."""

    def __init__(self, root: str, vm: uuid.UUID) -> None:
        self.vm = vm
        self.path = os.path.join(root, str(vm))

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def read(self) -> VmRecord | None:
        """None where there is none. Raises StorageError for one that is damaged."""
        path = self.file(RECORD)
        try:
            with open(path, "rb") as file:
                return VmRecord.model_validate_json(file.read())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StorageError(
                f"{path} cannot be read: {error}",
                hint="the VM's disks are untouched; put the file back or remove the folder",
            ) from error

    def write(self, record: VmRecord) -> None:
        make_folder(self.path)
        write_whole(self.file(RECORD), record.model_dump_json().encode())

    def remove(self) -> None:
        """All of it, the record last: whoever is killed here goes on by it."""
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.path):
                if name != RECORD:
                    os.unlink(self.file(name))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.file(RECORD))
        shutil.rmtree(self.path, ignore_errors=True)


def find_folders(root: str) -> list[VmFolder]:
    """Of all VMs that there are; what is no VM's is passed over."""
    found = []
    for name in sorted(os.listdir(root)):
        with contextlib.suppress(ValueError):
            found.append(VmFolder(root, uuid.UUID(name)))
    return found

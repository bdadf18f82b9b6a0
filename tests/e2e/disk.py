"""Disks to protect: loop devices over sparse images, with a file system or raw."""

import contextlib
import fcntl
import os
import subprocess
import time
from pathlib import Path

UNMOUNT_SECONDS_MAX = 10.0
_FITHAW = 0xC0045878
_MKFS = {
    # Else the kernel goes on for a while to write what mkfs has left out.
    "ext4": ("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
}


def run(*command: str | Path) -> str:
    """Run a tool; AssertionError with what it said when it fails."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout.strip()


class Disk:
    """A loop device over a sparse image.

    file_system: made and mounted by ``attach`` at ``mount_point``; none: a raw disk.
    """

    def __init__(self, folder: Path, index: int, size_bytes: int, file_system: str = "") -> None:
        self.index = index
        self.size_bytes = size_bytes
        self.file_system = file_system
        self.image = folder / f"disk{index}.img"
        self.mount_point = folder / f"mnt{index}"
        self.device = ""

    def attach(self) -> None:
        with self.image.open("wb") as file:
            file.truncate(self.size_bytes)
        self.device = run("losetup", "-f", "--show", self.image)
        if self.file_system:
            run(*_MKFS[self.file_system], self.device)
            self.mount_point.mkdir(exist_ok=True)
            self.mount()

    def mount(self) -> None:
        run("mount", self.device, self.mount_point)

    def unmount(self) -> None:
        """Unmount; an agent that is just syncing the file system holds it for a moment."""
        deadline = time.monotonic() + UNMOUNT_SECONDS_MAX
        while self.is_mounted:
            done = subprocess.run(
                ["umount", self.mount_point], check=False, capture_output=True, text=True
            )
            assert not done.returncode or time.monotonic() < deadline, done.stderr
            time.sleep(0.1 if done.returncode else 0)

    @property
    def is_mounted(self) -> bool:
        return os.path.ismount(self.mount_point)

    def flush(self) -> None:
        """Bring all that was written to the device into the image."""
        fd = os.open(self.device, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def write(self, offset: int, data: bytes) -> None:
        """To the device itself, and bring it into the image."""
        fd = os.open(self.device, os.O_RDWR)
        try:
            assert os.pwrite(fd, data, offset) == len(data)
            os.fsync(fd)
        finally:
            os.close(fd)

    def detach(self) -> None:
        """Leave nothing attached, whatever state it is in."""
        if self.is_mounted:
            self._thaw()
            done = subprocess.run(["umount", self.mount_point], check=False, capture_output=True)
            if done.returncode:
                subprocess.run(["umount", "-l", self.mount_point], check=False)
        if self.device:
            subprocess.run(["losetup", "-d", self.device], check=False)
            self.device = ""

    def _thaw(self) -> None:
        with contextlib.suppress(OSError):
            fd = os.open(self.mount_point, os.O_RDONLY | os.O_DIRECTORY)
            try:
                while True:  # a file system may be frozen more than once
                    fcntl.ioctl(fd, _FITHAW, 0)
            finally:
                os.close(fd)

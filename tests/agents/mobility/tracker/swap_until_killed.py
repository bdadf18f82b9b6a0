"""The process that test_ebpf_killed kills: attaches, then swaps and forgets without end.

Arguments: machine, disk path, path of the file in which found block sets are made durable.
"""

import os
import struct
import sys
import uuid

from agents.mobility.device import Device
from agents.mobility.tracker.ebpf import EbpfTracker


def main() -> None:
    machine, path, found_path = sys.argv[1:]
    fd = os.open(found_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    tracker = EbpfTracker.attach(uuid.UUID(machine), 0, Device.open(path))
    record = b"F" if tracker.fresh else b"A"
    os.write(fd, record + struct.pack("<I", 0))
    sys.stdout.write("attached\n")
    sys.stdout.flush()
    while True:
        found = tracker.swap().to_bytes()
        os.write(fd, b"S" + struct.pack("<I", len(found)) + found)
        os.fsync(fd)
        tracker.forget()


if __name__ == "__main__":
    main()

"""How full the spool is, counted before a byte is read: a segment reserves its place first.

All machines share one room, and each has a part of it that it may not go beyond while others want
to send as well.
"""

from dataclasses import dataclass

from appliance.process_server.refusal import Kind, RefusedError

ENTRY_BYTES = 4096
"""What a file or folder costs at most beside its content, so that many small ones count too."""

WARNING_RATIO = 0.70
CRITICAL_RATIO = 0.95

COMMIT_SPARE_BYTES = 64 << 20
"""Per machine, beyond what segments may fill: manifests, which let the spool drain."""


@dataclass(slots=True)
class Room:
    """Bytes of the spool: taken by what is there or on its way, and the most that may be."""

    bytes_max: int
    taken_bytes: int = 0

    def fits(self, size_bytes: int) -> bool:
        return self.taken_bytes + size_bytes + ENTRY_BYTES <= self.bytes_max

    @property
    def fill(self) -> float:
        return self.taken_bytes / self.bytes_max


@dataclass(slots=True)
class MachineRoom:
    """What of the room one machine has taken."""

    room: Room
    taken_bytes: int = 0

    def reserve(self, size_bytes: int, bytes_max: int) -> "Reservation":
        """Take room for a file; ``bytes_max`` is the machine's part of it.

        Raises RefusedError (spool_full, quota).
        """
        if not self.room.fits(size_bytes):
            raise RefusedError(
                Kind.SPOOL_FULL,
                f"the spool holds {self.room.taken_bytes} of at most {self.room.bytes_max} bytes: "
                f"no room for {size_bytes} more",
                hint="it drains as the applier catches up; wait and send again",
            )
        if not self.fits(size_bytes, bytes_max):
            raise RefusedError(
                Kind.QUOTA,
                f"the machine has {self.taken_bytes} bytes in the spool, of which it may fill "
                f"{bytes_max}: no room for {size_bytes} more",
                hint="it drains as the applier catches up with this machine; wait and send again",
            )
        self.take(size_bytes)
        return Reservation(self, size_bytes)

    def fits(self, size_bytes: int, bytes_max: int) -> bool:
        return self.taken_bytes + size_bytes + ENTRY_BYTES <= bytes_max

    def check_commit(self, size_bytes: int, bytes_max: int) -> None:
        """Raise RefusedError (quota) when manifests alone would fill the disk."""
        if not self.fits(size_bytes, bytes_max + COMMIT_SPARE_BYTES):
            raise RefusedError(
                Kind.QUOTA,
                f"the machine has {self.taken_bytes} bytes in the spool: no room for a manifest",
                hint="it drains as the applier catches up with this machine; wait and send again",
            )

    def take(self, size_bytes: int) -> None:
        """Count a file without asking: a commit, or what a start finds."""
        self.taken_bytes += size_bytes + ENTRY_BYTES
        self.room.taken_bytes += size_bytes + ENTRY_BYTES

    def give_back(self, size_bytes: int) -> None:
        self.taken_bytes -= size_bytes + ENTRY_BYTES
        self.room.taken_bytes -= size_bytes + ENTRY_BYTES
        assert self.taken_bytes >= 0
        assert self.room.taken_bytes >= 0


@dataclass(slots=True)
class Reservation:
    """Room for one file: given back unless the file is kept."""

    room: MachineRoom
    size_bytes: int

    def keep(self) -> None:
        """From here on the room belongs to the file."""
        self.size_bytes = -1

    def release(self) -> None:
        """Fine to call twice, and after ``keep``."""
        if self.size_bytes >= 0:
            self.room.give_back(self.size_bytes)
            self.size_bytes = -1

"""How full the spool is, counted before a byte is read: a segment reserves its place first."""

from dataclasses import dataclass

from appliance.process_server.refusal import Kind, RefusedError

ENTRY_BYTES = 4096
"""What a file or folder costs at most beside its content, so that many small ones count too."""

WARNING_RATIO = 0.70
CRITICAL_RATIO = 0.95


@dataclass(slots=True)
class Room:
    """Bytes of the spool: taken by what is there or on its way, and the most that may be."""

    bytes_max: int
    taken_bytes: int = 0

    def reserve(self, size_bytes: int) -> "Reservation":
        """Take room for a file; raise RefusedError (spool_full) when there is none."""
        if not self.fits(size_bytes):
            raise RefusedError(
                Kind.SPOOL_FULL,
                f"the spool holds {self.taken_bytes} of at most {self.bytes_max} bytes: "
                f"no room for {size_bytes} more",
                hint="it drains as the applier catches up; wait and send again",
            )
        self.take(size_bytes)
        return Reservation(self, size_bytes)

    def fits(self, size_bytes: int) -> bool:
        return self.taken_bytes + size_bytes + ENTRY_BYTES <= self.bytes_max

    def take(self, size_bytes: int) -> None:
        """Count a file without asking: a commit, or what a start finds."""
        self.taken_bytes += size_bytes + ENTRY_BYTES

    def give_back(self, size_bytes: int) -> None:
        self.taken_bytes -= size_bytes + ENTRY_BYTES
        assert self.taken_bytes >= 0

    @property
    def fill(self) -> float:
        return self.taken_bytes / self.bytes_max


@dataclass(slots=True)
class Reservation:
    """Room for one file: given back unless the file is kept."""

    room: Room
    size_bytes: int

    def keep(self) -> None:
        """From here on the room belongs to the file."""
        self.size_bytes = -1

    def release(self) -> None:
        """Fine to call twice, and after ``keep``."""
        if self.size_bytes >= 0:
            self.room.give_back(self.size_bytes)
            self.size_bytes = -1

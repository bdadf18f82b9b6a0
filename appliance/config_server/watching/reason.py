"""Why something is not well: codes, and for each its cause and what to do.

Source: docs/CONTROL.md §10.
"""

import enum
from collections.abc import Iterable
from dataclasses import dataclass

_MINUTE = 60
_HOUR = 3600
_DAY = 86400
MESSAGE_CHARS_MAX = 1000


class Severity(enum.StrEnum):
    """How bad; ``rank`` orders them."""

    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        return 1 if self is Severity.WARNING else 2


class State(enum.StrEnum):
    """The health of a machine or of a component."""

    NORMAL = "normal"
    WARNING = "warning"
    CRITICAL = "critical"


class Code(enum.StrEnum):
    """What is not well."""

    RPO_EXCEEDED = "rpo-exceeded"
    RESTORABLE_LATE = "restorable-late"
    NO_CRASH_POINT = "no-crash-point"
    NO_APP_POINT = "no-app-point"
    POINTS_INCONSISTENT = "points-inconsistent"
    AGENT_SILENT = "agent-silent"
    AGENT_TROUBLE = "agent-trouble"
    RESYNC_REQUIRED = "resync-required"
    NO_PROGRESS = "no-progress"
    REPLICATION_FAILED = "replication-failed"
    STORE_LOST = "store-lost"
    STORE_REPAIRS = "store-repairs"
    JOB_FAILED = "job-failed"
    CLOCK_SKEW = "clock-skew"
    CERTIFICATE_ENDS = "certificate-ends"
    PROCESS_SERVER_UNWELL = "process-server-unwell"
    APPLIER_UNWELL = "applier-unwell"
    NODE_SILENT = "node-silent"
    NODE_TROUBLE = "node-trouble"
    CPU_HIGH = "cpu-high"
    MEMORY_HIGH = "memory-high"
    SPOOL_LOW = "spool-low"
    BACKLOG_LONG = "backlog-long"
    STORE_SPACE_LOW = "store-space-low"
    VCENTER_UNREACHABLE = "vcenter-unreachable"
    VCENTER_REFUSES = "vcenter-refuses"
    FAILOVER_FAILED = "failover-failed"
    TEST_NOT_CLEANED = "test-not-cleaned-up"
    NOT_COMMITTED = "not-committed"
    DRILL_FAILED = "drill-failed"
    DRILL_LATE = "drill-late"
    JOB_NOT_UNDONE = "job-not-undone"
    DEFECT = "defect"


@dataclass(frozen=True, slots=True)
class Kind:
    """What is known of a code beforehand.

    opens_event: False where another source's event already tells it: two hundred machines of one
                 dead process server would be two hundred e-mails.
    """

    cause: str
    action: str
    opens_event: bool = True


KINDS: dict[Code, Kind] = {
    Code.RPO_EXCEEDED: Kind(
        "changes reach the cache storage account too late",
        "look at the network between machine and process server, and at the process server's load",
    ),
    Code.RESTORABLE_LATE: Kind(
        "the applier falls behind, or the cache storage account does",
        "look at the applier's load, disk and reasons",
    ),
    Code.NO_CRASH_POINT: Kind(
        "no consistent changeset was taken or applied",
        "look at the machine's other reasons: agent, process server, applier",
    ),
    Code.NO_APP_POINT: Kind(
        "the scripts before a point fail or take too long",
        "look at the reasons of the newest points and at the agent's log",
    ),
    Code.POINTS_INCONSISTENT: Kind(
        "a disk cannot be frozen, or never comes to rest",
        "see the reason; put a file system on the disk or make its writers pause",
    ),
    Code.AGENT_SILENT: Kind(
        "the machine or its agent is down, or cannot reach the config server",
        "look whether the machine runs, then `systemctl status understudy-agent` on it",
    ),
    Code.AGENT_TROUBLE: Kind(
        "the agent says that a part of it is not well",
        "see the reason; `understudy agent status` on the machine tells more",
    ),
    Code.RESYNC_REQUIRED: Kind(
        "changes since some moment are not known",
        "it begins by itself in the policy's window; `understudy resync MACHINE --now` begins it",
    ),
    Code.NO_PROGRESS: Kind(
        "the agent, the network or the process server is stuck",
        "look at agent and process server; restarting the agent loses nothing",
    ),
    Code.REPLICATION_FAILED: Kind(
        "the agent cannot go on by itself",
        "see the reason; mend it and restart the agent",
    ),
    Code.STORE_LOST: Kind(
        "the applier cannot apply what comes: something between is gone",
        "`understudy resync MACHINE --now`",
    ),
    Code.STORE_REPAIRS: Kind(
        "blocks at the second site are rotten or do not match the source",
        "they are fetched again by themselves; check the disk below the store",
    ),
    Code.JOB_FAILED: Kind(
        "a job could not do what it was asked for",
        "see the job's error, mend its cause and ask again",
    ),
    Code.CLOCK_SKEW: Kind(
        "its clock and the config server's differ",
        "let chrony or systemd-timesyncd run on both; points bear the source's time",
    ),
    Code.CERTIFICATE_ENDS: Kind(
        "it was not renewed at two thirds of its life",
        "look whether the node reaches the config server; enrol it again if need be",
    ),
    Code.PROCESS_SERVER_UNWELL: Kind(
        "the process server of this machine is in a critical state",
        "see the process server's reasons",
        opens_event=False,
    ),
    Code.APPLIER_UNWELL: Kind(
        "the applier of this machine is in a critical state",
        "see the applier's reasons",
        opens_event=False,
    ),
    Code.NODE_SILENT: Kind(
        "its host or its service is down, or it cannot reach the config server",
        "look at its service on its host",
    ),
    Code.NODE_TROUBLE: Kind(
        "the daemon says that a part of it is not well",
        "see the reason; its /healthz and its log tell more",
    ),
    Code.CPU_HIGH: Kind(
        "it has more to do than its host can",
        "give it more cores, or move machines to another one",
    ),
    Code.MEMORY_HIGH: Kind(
        "its host's memory is nearly used up",
        "give it more memory, or move machines to another one",
    ),
    Code.SPOOL_LOW: Kind(
        "the applier or the cache storage account does not keep up, or the disk is filling",
        "look at applier and account; then raise `spool.bytes_max` if the disk has room",
    ),
    Code.BACKLOG_LONG: Kind(
        "the cache storage account takes less than comes in",
        "look at the way to the account and at its load",
    ),
    Code.STORE_SPACE_LOW: Kind(
        "recovery points and other files fill the disk",
        "add room, shorten the retention, or move machines to another applier",
    ),
    Code.VCENTER_UNREACHABLE: Kind(
        "it is down or cannot be reached; what is known of its VMs is old",
        "look at the vCenter and the network; replication is not affected",
    ),
    Code.VCENTER_REFUSES: Kind(
        "user or password are wrong; it is not asked again until they are changed",
        "set the password anew: `understudy vcenters update NAME --password-file FILE`",
    ),
    Code.FAILOVER_FAILED: Kind(
        "a step of it could not be done, or the virtual machine did not come up",
        "see the failover's error and its console; another point may be better",
    ),
    Code.TEST_NOT_CLEANED: Kind(
        "its virtual machine uses memory, and its recovery point is kept",
        "`understudy failover cleanup MACHINE` removes all of it",
    ),
    Code.NOT_COMMITTED: Kind(
        "the virtual machine still reads from its recovery point; nothing protects it",
        "commit the failover, or take it back: `understudy failover list`",
    ),
    Code.DRILL_FAILED: Kind(
        "it could not begin, a step of it failed, or a machine did not come up or pass its check",
        "see its report: `understudy drills list`; mend the cause. It ends with the next drill of "
        "the schedule that passes, or with the schedule: `understudy drills unschedule`",
    ),
    Code.DRILL_LATE: Kind(
        "the config server does not begin it",
        "see `understudy drills schedules`, `understudy jobs`, and /healthz of the config server",
    ),
    Code.JOB_NOT_UNDONE: Kind(
        "a defect of the config server kept the job from being undone",
        "see the job's error; tell the maintainers, with the config server's log",
    ),
    Code.DEFECT: Kind(
        "the config server itself has a defect; others are watched as ever",
        "tell its maintainers, with the config server's log",
    ),
}


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that is not well, in words for a person."""

    code: Code
    severity: Severity
    message: str
    cause: str
    action: str

    @property
    def opens_event(self) -> bool:
        return KINDS[self.code].opens_event


@dataclass(frozen=True, slots=True)
class Health:
    """The worst of the reasons, and the reasons, worst first."""

    state: State
    reasons: tuple[Reason, ...] = ()


def reason(
    code: Code, severity: Severity, message: str, *, cause: str = "", action: str = ""
) -> Reason:
    """``cause``, ``action``: what is known better than the code tells."""
    kind = KINDS[code]
    return Reason(
        code, severity, clean(message), clean(cause) or kind.cause, clean(action) or kind.action
    )


def health_of(reasons: Iterable[Reason | None]) -> Health:
    """Nones are things that are well."""
    found = sorted((one for one in reasons if one is not None), key=lambda one: -one.severity.rank)
    if not found:
        return Health(State.NORMAL)
    return Health(State(found[0].severity.value), tuple(found))


def clean(text: str) -> str:
    """One line of what prints: nodes' words reach terminals, logs and mail headers."""
    line = "".join(char if char.isprintable() else " " for char in text)
    return " ".join(line.split())[:MESSAGE_CHARS_MAX]


def duration(seconds: float) -> str:
    """For people: ``45 s``, ``16 min``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = max(0, int(seconds))
    if whole < _MINUTE * 2:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min"
    big, small, units = (_DAY, _HOUR, "d h") if whole >= _DAY else (_HOUR, _MINUTE, "h min")
    first, second = units.split()
    rest = whole % big // small
    return f"{whole // big} {first} {rest} {second}" if rest else f"{whole // big} {first}"

"""What a drill was and what came of it, as a document that stands for itself, with its digest.

The digest is of the document's JSON in one form (keys sorted, no spaces, ASCII) without the digest
itself. It is in the audit log as well: whoever changes a report has to change both.

Source: docs/RECOVERY.md §6; RFC 8785 for the idea of one form.
"""

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

FORMAT = 1
CONSOLE_CHARACTERS_MAX = 8192
SCREENSHOTS_BYTES_MAX = 24 << 20
"""Of all machines together, in base64; those beyond are left out, and the report says so."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class FileSystemEvidence(_Document):
    """A file system that was mounted and checked."""

    disk: int
    device: str
    kind: str
    clean: bool
    detail: str = ""
    used_bytes: int = 0


class MachineEvidence(_Document):
    """One machine of the drill. Times in nanoseconds since 1970, 0 where it came not to that.

    rto_seconds: from the request to passed checks.
    rpo_seconds: the request's time less the point's.
    screenshot:  a PNG in base64.
    """

    machine: str
    group: int
    state: str
    passed: bool
    point: str = ""
    point_ns: int = 0
    consistency: str = ""
    rto_seconds: float | None = None
    rpo_seconds: float | None = None
    guest: str = ""
    address: str = ""
    check: str = ""
    script_exit: int | None = None
    script_output: str = ""
    file_systems: tuple[FileSystemEvidence, ...] = ()
    error: str = ""
    console: str = ""
    screenshot: str = ""


class ActionEvidence(_Document):
    """One action of the drill."""

    group: int
    place: str
    name: str
    kind: str
    state: str
    attempt: int = 1
    exit_code: int | None = None
    detail: str = ""
    output: str = ""
    seconds: float | None = None
    resumed_by: str = ""
    note: str = ""


class StepEvidence(_Document):
    """A step of one of the drill's jobs."""

    name: str
    state: str
    note: str = ""
    seconds: float | None = None


class CleanupEvidence(_Document):
    """Whether all of it has gone again."""

    state: str
    error: str = ""
    steps: tuple[StepEvidence, ...] = ()


class DrillDocument(_Document):
    """A drill's report. ``digest``: see the module."""

    format: int = FORMAT
    id: str
    of: Literal["plan", "machine"]
    target: str
    schedule: str = ""
    asked_by: str
    notes: str = ""
    point: str = ""
    network: str = ""
    passed: bool
    reason: str = ""
    began_ns: int
    run_ended_ns: int = 0
    ended_ns: int = 0
    rto_seconds: float | None = None
    run: str = ""
    job: str = ""
    machines: tuple[MachineEvidence, ...] = ()
    actions: tuple[ActionEvidence, ...] = ()
    steps: tuple[StepEvidence, ...] = ()
    cleanup: CleanupEvidence | None = None
    remarks: tuple[str, ...] = ()
    digest: str = ""


def digest_of(tree: dict[str, Any]) -> str:
    """Of a report as JSON; ``sha256:`` and 64 hexadecimal digits."""
    rest = {key: value for key, value in tree.items() if key != "digest"}
    whole = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"sha256:{hashlib.sha256(whole.encode()).hexdigest()}"


def sealed(document: DrillDocument) -> dict[str, Any]:
    """The report as JSON, with its digest."""
    tree = document.model_dump(mode="json")
    return {**tree, "digest": digest_of(tree)}


def is_untouched(tree: dict[str, Any]) -> bool:
    """Whether a report is what its digest is of."""
    return bool(tree.get("digest")) and digest_of(tree) == tree["digest"]

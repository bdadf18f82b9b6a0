"""What the configuration says of recovery."""

from typing import Annotated

from pydantic import Field, StringConstraints

from daemon.config import Section

Folder = Annotated[str, StringConstraints(pattern=r"^/[^\x00]*$", max_length=1024)]


class RecoveryConfig(Section):
    """What recovery plans may do on this host, and how long drills are kept.

    scripts_folder:       programs that plans may run here, as whom this daemon runs; none: they
                          run nothing here. Root's, and nobody else may write below it.
    allow_inline_scripts: plans may bring the text of what they run here. Who may write plans may
                          then do whatever this daemon may.
    keys_folder:          private keys and known hosts for scripts over SSH; none: no SSH.
    actions_at_once:      over all runs.
    drill_seconds:        how often due drills are looked for.
    evidence_seconds:     how long a drill waits for the screenshots of VMs that are up.
    drill_count_max:      reports of drills that are kept, the newest ones.
    """

    scripts_folder: Folder | None = None
    allow_inline_scripts: bool = False
    keys_folder: Folder | None = None
    actions_at_once: int = Field(default=16, ge=1, le=256)
    drill_seconds: float = Field(default=5.0, ge=0.05, le=3600)
    evidence_seconds: float = Field(default=30.0, ge=0, le=600)
    drill_count_max: int = Field(default=500, ge=1, le=100_000)

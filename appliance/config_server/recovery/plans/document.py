"""A recovery plan as people write it: JSON at the API, YAML in files.

What can be said of a plan alone (its shape) is checked here; what depends on machines and points is
checked in `validation`. Nothing inside works with these models: see `plan`.

Source: docs/RECOVERY.md §5.
"""

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from appliance.config_server.recovery.run import (
    ACTION_SECONDS_DEFAULT,
    ACTION_SECONDS_MAX,
    ACTIONS_MAX,
    GROUPS_MAX,
    ActionKind,
    OnFailure,
)
from replication.control.recovery import GuestChoice, Script

MACHINES_MAX = 100
"""In a plan, over all of its groups."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9 ._@-]*$"
COMMAND_CHARACTERS_MAX = 4096
HEADERS_MAX = 20
URL_CHARACTERS_MAX = 2048
DESCRIPTION_CHARACTERS_MAX = 4096
_FOLDERS_UP = re.compile(r"(^|/)\.\.?(/|$)")

PlanName = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=NAME_PATTERN)]
Label = Annotated[
    str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")
]
MachineReference = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00-\x1f\x7f]+$")
]
Prose = Annotated[
    str, StringConstraints(max_length=DESCRIPTION_CHARACTERS_MAX, pattern=r"^[^\x00]*$")
]
FileBelow = Annotated[
    str, StringConstraints(min_length=1, max_length=255, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_./-]*$")
]
"""A file, relative to a folder that the config server's configuration names."""

SecondsMax = Annotated[int, Field(ge=1, le=ACTION_SECONDS_MAX)]


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SshPlace(_Document):
    """Where a script runs over SSH.

    key_file, known_hosts: below the config server's ``recovery.keys_folder``. The host's key must
    be in ``known_hosts``: nobody else is spoken to.
    """

    host: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.:-]{0,252}$")]
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    user: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@\\-]{0,63}$")]
    key_file: FileBelow
    known_hosts: FileBelow = "known_hosts"

    @field_validator("key_file", "known_hosts")
    @classmethod
    def _is_below(cls, path: str) -> str:
        if _FOLDERS_UP.search(path):
            raise ValueError("a file below recovery.keys_folder was expected, without . and ..")
        return path


class ScriptAction(_Document):
    """A program: ``command`` or ``inline``, one of them.

    command: on the config server's host a file below ``recovery.scripts_folder`` and its arguments,
             words as a shell reads them (there is none); over SSH a command for the user's shell.
    inline:  a text for ``/bin/sh``. On the config server's host only where its configuration says
             ``recovery.allow_inline_scripts``.
    """

    command: Annotated[
        str | None, StringConstraints(max_length=COMMAND_CHARACTERS_MAX, pattern=r"^[^\x00]+$")
    ] = None
    inline: Script | None = None
    where: Literal["local"] | SshPlace = "local"
    seconds_max: SecondsMax = ACTION_SECONDS_DEFAULT

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if bool((self.command or "").strip()) == bool((self.inline or "").strip()):
            raise ValueError("a script has a command or an inline text, one of them")
        return self


class ManualAction(_Document):
    """Something that a person does: the run waits until its job is resumed."""

    instruction: Annotated[
        str,
        StringConstraints(
            min_length=1, max_length=DESCRIPTION_CHARACTERS_MAX, pattern=r"^[^\x00]*$"
        ),
    ]


class WebhookAction(_Document):
    """An HTTP POST with the run as JSON; a status of 2xx is success. Redirects are not followed.

    headers: their values are secrets: kept sealed and never shown again.
    """

    url: Annotated[str, StringConstraints(min_length=1, max_length=URL_CHARACTERS_MAX)]
    headers: Annotated[dict[str, str], Field(max_length=HEADERS_MAX)] = {}
    seconds_max: SecondsMax = 30

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
        except ValueError:
            good = False
        if not good or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError("a URL that begins with http:// or https:// was expected")
        if parts.username or parts.password:
            raise ValueError("no user and password in a URL: use the header Authorization")
        return url

    @field_validator("headers")
    @classmethod
    def _are_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        names = set()
        for name, value in headers.items():
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}", name):
                raise ValueError(f"{name!r:.80} is no name of a header")
            if name.lower() in _OWN_HEADERS:
                raise ValueError(f"the header {name} cannot be set")
            if not value.isascii() or not value.isprintable() or len(value) > URL_CHARACTERS_MAX:
                raise ValueError(f"the value of the header {name} is not printable ASCII, or long")
            if name.lower() in names:
                raise ValueError(f"the header {name} is there twice")
            names.add(name.lower())
        return headers


_OWN_HEADERS = frozenset(
    {"content-length", "content-type", "connection", "host", "te", "transfer-encoding", "upgrade"}
)


class PlanAction(_Document):
    """What is done before or after a group: one of ``script``, ``manual``, ``webhook``.

    on_failure: ``stop`` ends the run; ``continue`` goes on, and the run tells of it.
    """

    name: Label
    script: ScriptAction | None = None
    manual: ManualAction | None = None
    webhook: WebhookAction | None = None
    on_failure: OnFailure = OnFailure.STOP

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(each is not None for each in (self.script, self.manual, self.webhook)) != 1:
            raise ValueError("an action is one of script, manual, webhook")
        return self

    @property
    def kind(self) -> ActionKind:
        if self.script is not None:
            return ActionKind.SCRIPT
        return ActionKind.WEBHOOK if self.webhook is not None else ActionKind.MANUAL


class PlanMachine(_Document):
    """A machine by name or id, and how its VM is made.

    script: run by the recovery guest when all is mounted; exit code 0 passes the check.
    """

    machine: MachineReference
    guest: GuestChoice = GuestChoice.AUTO
    script: Script = ""
    cpu_count: Annotated[int, Field(ge=1, le=64)] = 1
    memory_bytes: Annotated[int, Field(ge=64 << 20, le=1 << 40)] = 512 << 20
    check_seconds_max: Annotated[int, Field(ge=1, le=86400)] = 300


class PlanGroup(_Document):
    """Machines that are started together, after those of the groups before."""

    name: Label
    machines: Annotated[tuple[PlanMachine, ...], Field(max_length=MACHINES_MAX)] = ()
    before: Annotated[tuple[PlanAction, ...], Field(max_length=ACTIONS_MAX)] = ()
    after: Annotated[tuple[PlanAction, ...], Field(max_length=ACTIONS_MAX)] = ()


class PlanDocument(_Document):
    """A recovery plan. on_failure: what a machine that fails does to the run."""

    name: PlanName
    description: Prose = ""
    on_failure: OnFailure = OnFailure.STOP
    groups: Annotated[tuple[PlanGroup, ...], Field(min_length=1, max_length=GROUPS_MAX)]

"""What a replication policy may say, and why not.

Source: docs/CONTROL.md §8.
"""

import re
from dataclasses import asdict, dataclass, fields

from appliance.config_server.protection.window import Window
from replication.errors import ConfigError, InputError

HOUR = 3600
DAY = 24 * HOUR
RETENTION_SECONDS_MIN = HOUR
RETENTION_SECONDS_MAX = 15 * DAY
CRASH_FREQUENCY_SECONDS = 300
APP_FREQUENCY_SECONDS_MIN = HOUR
APP_FREQUENCY_SECONDS_MAX = 12 * HOUR
RPO_THRESHOLD_SECONDS_MIN = 60
RPO_THRESHOLD_SECONDS_MAX = DAY
LAB_SECONDS_MIN = 1
"""The shortest time that a lab may set where others may not choose (`allow_short_...`)."""

NAME_CHARS_MAX = 64
FAILBACK_SUFFIX = "-failback"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]*(?<! )")

REPLICATION = "replication"
FAILBACK = "failback"


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What can be set, with the defaults. ``app_frequency_seconds`` 0: no app-consistent points."""

    rpo_threshold_seconds: int = 900
    retention_seconds: int = DAY
    crash_frequency_seconds: int = CRASH_FREQUENCY_SECONDS
    app_frequency_seconds: int = 0
    resync_window: str = "22:00-06:00"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a policy is refused: the key, and a sentence."""

    key: str
    reason: str


class PolicyError(InputError):
    """A policy says something that makes no sense; nothing was changed."""

    code = "policy"

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(f"{each.key}: {each.reason}" for each in problems))
        self.problems = problems


def check_name(name: str) -> None:
    """Raises PolicyError. The name must fit into a path and leave room for the failback's."""
    if len(name) > NAME_CHARS_MAX:
        raise PolicyError((Problem("name", f"is longer than {NAME_CHARS_MAX} characters"),))
    if not _NAME.fullmatch(name):
        raise PolicyError(
            (
                Problem(
                    "name",
                    "must begin with a letter or digit, then have letters, digits, spaces, dots, "
                    "hyphens or underscores alone",
                ),
            )
        )
    if name.endswith(FAILBACK_SUFFIX):
        raise PolicyError(
            (Problem("name", f"names that end in {FAILBACK_SUFFIX} belong to failback policies"),)
        )


def check_settings(settings: PolicySettings, *, allow_short_crash_frequency: bool) -> None:
    """Raises PolicyError that tells every problem at once."""
    problems = tuple(_problems(settings, lab=allow_short_crash_frequency))
    if problems:
        raise PolicyError(problems)


def _problems(settings: PolicySettings, *, lab: bool) -> list[Problem]:
    told = []
    crash, app = settings.crash_frequency_seconds, settings.app_frequency_seconds
    retention, rpo = settings.retention_seconds, settings.rpo_threshold_seconds
    retention_min = LAB_SECONDS_MIN if lab else RETENTION_SECONDS_MIN
    if retention < retention_min:
        told.append(Problem("retention_seconds", f"must be at least {retention_min}"))
    if retention > RETENTION_SECONDS_MAX:
        told.append(
            Problem(
                "retention_seconds", f"points are kept for up to {RETENTION_SECONDS_MAX} (15 d)"
            )
        )
    if not lab and crash != CRASH_FREQUENCY_SECONDS:
        told.append(
            Problem(
                "crash_frequency_seconds",
                f"is fixed at {CRASH_FREQUENCY_SECONDS}; a lab may set others with "
                "policies.allow_short_crash_frequency in the configuration file",
            )
        )
    if lab and not LAB_SECONDS_MIN <= crash <= CRASH_FREQUENCY_SECONDS:
        told.append(
            Problem(
                "crash_frequency_seconds",
                f"must be {LAB_SECONDS_MIN} to {CRASH_FREQUENCY_SECONDS}",
            )
        )
    app_min = LAB_SECONDS_MIN if lab else APP_FREQUENCY_SECONDS_MIN
    if app and not app_min <= app <= APP_FREQUENCY_SECONDS_MAX:
        told.append(
            Problem(
                "app_frequency_seconds",
                f"must be 0 (off) or {app_min} to {APP_FREQUENCY_SECONDS_MAX} (12 h)",
            )
        )
    if app and app >= retention:
        told.append(
            Problem(
                "app_frequency_seconds",
                f"must be less than retention_seconds ({retention}), else no app-consistent point "
                "is there at times",
            )
        )
    rpo_min = LAB_SECONDS_MIN if lab else RPO_THRESHOLD_SECONDS_MIN
    if not rpo_min <= rpo <= RPO_THRESHOLD_SECONDS_MAX:
        told.append(
            Problem("rpo_threshold_seconds", f"must be {rpo_min} to {RPO_THRESHOLD_SECONDS_MAX}")
        )
    try:
        Window.parse(settings.resync_window)
    except ConfigError as error:
        told.append(Problem("resync_window", str(error)))
    return told


def changed(settings: PolicySettings, changes: dict[str, int | str]) -> PolicySettings:
    """``settings`` with some of them replaced; the keys are known to be right."""
    known = {field.name for field in fields(PolicySettings)}
    assert changes.keys() <= known
    return PolicySettings(**{**asdict(settings), **changes})


def failback_name(name: str) -> str:
    return name + FAILBACK_SUFFIX

"""A daemon's health as its reports carry it."""

from daemon.service import Health
from replication.control.report import TROUBLES_MAX, Trouble

TEXT_CHARS_MAX = 2000
"""Of a reason, as documents take it."""


def troubles_of(health: Health) -> tuple[Trouble, ...]:
    """What is not well, the critical first, as many as a report takes."""
    told = [
        Trouble(part=clipped(part), severity="critical", reason=clipped(reason))
        for part, reason in sorted(health.criticals.items())
    ]
    told += [
        Trouble(part=clipped(part), severity="warning", reason=clipped(reason))
        for part, reason in sorted(health.warnings.items())
    ]
    return tuple(told[:TROUBLES_MAX])


def clipped(text: str) -> str:
    """``text`` as a report takes it: not too long, no NUL, and nothing that UTF-8 has not, such as
    parts of a file's name; these are written as escapes.
    """
    text = text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[: TEXT_CHARS_MAX - 1]}…"

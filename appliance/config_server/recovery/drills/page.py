"""A drill's report for people: one page of HTML that needs nothing else, fit for paper.

Everything in it comes from machines and plans that others write: the template escapes all of it,
and the page allows no script and loads nothing.

Source: docs/RECOVERY.md §6; docs/adr/0017-jinja2-and-croniter.md.
"""

import base64
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from appliance.config_server.recovery.drills.report import DrillDocument

PNG = b"\x89PNG\r\n\x1a\n"
_TEMPLATE = "page.html.j2"


def render(tree: dict[str, Any]) -> str:
    """The page of a report as `report.sealed` made it."""
    drill = DrillDocument.model_validate(tree)
    slowest = max((one.rto_seconds or 0.0 for one in drill.machines), default=0.0)
    oldest = max((one.rpo_seconds for one in drill.machines if one.rpo_seconds), default=None)
    return _template().render(drill=drill, slowest=slowest, oldest=oldest, groups=_groups(drill))


def _groups(drill: DrillDocument) -> list[dict[str, Any]]:
    numbers = sorted({one.group for one in drill.machines} | {one.group for one in drill.actions})
    return [
        {
            "number": number,
            "machines": [one for one in drill.machines if one.group == number],
            "before": [
                one for one in drill.actions if one.group == number and one.place == "before"
            ],
            "after": [one for one in drill.actions if one.group == number and one.place == "after"],
        }
        for number in numbers
    ]


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        instant=instant, span=span, image=image, size=size, share=share, plural=plural
    )
    source = files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source)


def instant(time_ns: int) -> str:
    """To the second, in UTC; a dash where there is none."""
    if not time_ns:
        return "\N{EN DASH}"
    return f"{datetime.fromtimestamp(time_ns // 10**9, UTC):%Y-%m-%d %H:%M:%S} UTC"


def span(seconds: float | None) -> str:
    """As ``8.4 s``, ``2 min 5 s``, ``1 h 2 min``."""
    if seconds is None:
        return "\N{EN DASH}"
    if seconds < 60:
        return f"{max(0.0, seconds):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(size_bytes: int) -> str:
    """In the unit that suits."""
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def share(part: float | None, whole: float) -> int:
    """A part in percent, as wide as a bar is drawn."""
    return 0 if not part or whole <= 0 else max(1, min(100, round(100 * part / whole)))


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def image(encoded: str) -> str:
    """A screenshot as a data URI; empty for what is no PNG."""
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        return ""
    if not content.startswith(PNG):
        return ""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"

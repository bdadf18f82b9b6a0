"""Structured logs: one line an event, to standard error, nouns as fields."""

import logging
import sys
from typing import Any

import structlog

LIBRARIES_THAT_WARN_OF_ANSWERS = ("azure",)
"""Of an answer that is an error; whoever asked gets that as an exception, and tells of it."""


def configure_log(*, daemon: str, as_json: bool = False, level: str = "info") -> None:
    """Set up structlog for this process; every line names ``daemon``."""
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[level.upper()]
        ),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(daemon=daemon)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for name in LIBRARIES_THAT_WARN_OF_ANSWERS:
        logging.getLogger(name).setLevel(logging.ERROR)

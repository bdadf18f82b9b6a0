import json
import subprocess
import sys

LOGGER = """
import logging, sys, structlog
from daemon.log import configure_log
configure_log(daemon="tested", as_json=True, level=sys.argv[1])
structlog.get_logger().info("segment stored", segment=3)
structlog.get_logger().warning("spool nearly full")
logging.getLogger("library").info("chatter")
"""


def lines(level: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, "-c", LOGGER, level], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_line_is_an_event_with_its_nouns() -> None:
    first, second = lines("info")
    assert (first["event"], first["segment"], first["level"]) == ("segment stored", 3, "info")
    assert first["daemon"] == second["daemon"] == "tested"
    assert str(first["timestamp"]).endswith("Z")


def test_level_leaves_out_what_is_below() -> None:
    assert [line["event"] for line in lines("warning")] == ["spool nearly full"]

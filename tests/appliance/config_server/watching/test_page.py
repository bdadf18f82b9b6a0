"""docs/WATCHING.md against the code: reasons, and metrics of all daemons."""

import re
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry

from appliance.config_server.discovery.record import VCenterState
from appliance.config_server.store.connection import make_engine
from appliance.config_server.store.engine import Database
from appliance.config_server.watching.component_health import REFUSED, UNREACHABLE
from appliance.config_server.watching.config import SmtpConfig, WatchingConfig
from appliance.config_server.watching.part import open_watching
from appliance.config_server.watching.reason import Code
from daemon.service import Health

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "WATCHING.md").read_text()


def first_cells(heading: str) -> list[str]:
    """What stands in the first column of the table under a heading."""
    text = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    cells = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line[:3] == "| `"]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_page_lists_each_reason_and_no_other() -> None:
    assert sorted(first_cells("Reasons")) == sorted(Code)


def test_page_lists_each_metric_of_the_config_server_and_no_other(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    database = Database(make_engine(f"sqlite+aiosqlite:///{tmp_path}/never-opened"))
    with open_watching(
        WatchingConfig(),
        SmtpConfig(),
        database=database,
        health=Health(),
        registry=registry,
        clock=lambda: 0,
        newest=lambda _node: None,
    ):
        made = {
            f"{metric.name}_total" if metric.type == "counter" else metric.name
            for metric in registry.collect()
        }
    told = {name for name in first_cells("Metrics") if "_config_server_" in name}
    assert told == made


def test_metrics_of_the_other_daemons_are_in_their_code() -> None:
    """They make up their names of parts; the last part must be there."""
    source = "\n".join(
        path.read_text()
        for folder in ("agents", "appliance/process_server", "appliance/applier", "azure_emu")
        for path in (ROOT / folder).rglob("*.py")
    )
    others = [name for name in first_cells("Metrics") if "_config_server_" not in name]
    assert len(others) > 20
    for name in others:
        short = re.sub(r"^understudy_(agent_|applier_)?", "", name)
        short = short.removesuffix("_total")
        short = re.sub(r"^rpo_(durable|restorable)_seconds$", "rpo_", short)
        assert short in source, name


def test_states_of_vcenters_are_those_that_discovery_writes() -> None:
    assert {REFUSED, UNREACHABLE} == {VCenterState.REFUSED, VCenterState.UNREACHABLE}


def test_the_pure_parts_need_no_database_and_no_network() -> None:
    code = (
        "import sys, appliance.config_server.watching.assessment;"
        "sys.exit(bool({'sqlalchemy', 'fastapi', 'asyncio', 'aiosmtplib'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)

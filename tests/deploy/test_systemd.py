"""The units and example configurations that operators copy: they load, and say what they mean."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agents.mobility.config import AgentConfig
from agents.mobility.controlled_config import ControlledConfig
from appliance.applier.config import ApplierConfig
from appliance.config_server.config import ConfigServerConfig
from appliance.process_server.config import Config as ProcessServerConfig
from azure_emu.compute.config import ComputeConfig
from azure_emu.config import Config as AzureConfig

if TYPE_CHECKING:
    from daemon.config import DaemonConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "systemd"
UNITS = sorted(path.name for path in FOLDER.glob("*.service"))
MODELS: dict[str, type[DaemonConfig]] = {
    "agent": AgentConfig,
    "config-server": ConfigServerConfig,
    "process-server": ProcessServerConfig,
    "applier": ApplierConfig,
    "azure-emu": AzureConfig,
    "compute": ComputeConfig,
}
EXAMPLES: dict[str, type[DaemonConfig]] = {**MODELS, "agent-controlled": ControlledConfig}
EXPOSURE_MAX = {
    "understudy-agent.service": 3.5,
    "understudy-process-server.service": 1.5,
    "understudy-applier.service": 1.5,
    "understudy-config-server.service": 1.8,
    "understudy-azure-emu.service": 1.5,
    "understudy-compute.service": 6.0,
}
"""What `systemd-analyze security` may say, of 10.0 (without any protection)."""

ROOTS = ("understudy-agent.service", "understudy-compute.service")
"""Units that run as root."""

DROP_INS = {
    "understudy-agent.service": "app-scripts.conf",
    "understudy-applier.service": "points.conf",
}
INSTALLED = "/opt/understudy/.venv/bin/"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )


def copy_of(name: str, folder: Path) -> Path:
    """The unit with the programs of this environment, since verify looks for them."""
    text = (FOLDER / name).read_text()
    assert INSTALLED in text
    copy = folder / name
    copy.write_text(text.replace(INSTALLED, f"{Path(sys.executable).parent}/"))
    return copy


def setting(unit: str, name: str) -> list[str]:
    found = re.findall(rf"^{name}=(.*)$", (FOLDER / unit).read_text(), re.MULTILINE)
    return [word for value in found for word in value.split()]


def test_every_daemon_has_a_unit_and_an_example() -> None:
    assert sorted(f"understudy-{daemon}.service" for daemon in MODELS) == UNITS
    assert {path.stem for path in (FOLDER / "examples").glob("*.toml")} == set(EXAMPLES)
    assert set(EXPOSURE_MAX) == set(UNITS)


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_nothing_to_say_about_a_unit(unit: str, tmp_path: Path) -> None:
    done = analyze("verify", str(copy_of(unit, tmp_path)))
    # It returns 0 even for keys that it does not know.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("unit", "drop_in"), DROP_INS.items())
def test_systemd_finds_nothing_to_say_about_a_drop_in(
    unit: str, drop_in: str, tmp_path: Path
) -> None:
    copy = copy_of(unit, tmp_path)
    (tmp_path / f"{unit}.d").mkdir()
    shutil.copy(FOLDER / "examples" / drop_in, tmp_path / f"{unit}.d")
    done = analyze("verify", str(copy))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_verify_would_tell_of_a_misspelt_key(tmp_path: Path) -> None:
    """Else the two tests above could not fail."""
    copy = copy_of(UNITS[0], tmp_path)
    copy.write_text(copy.read_text().replace("ProtectClock=", "ProtectKlock="))
    assert "ProtectKlock" in analyze("verify", str(copy)).stderr


@pytest.mark.parametrize("unit", UNITS)
def test_exposure_stays_below_its_bound(unit: str, tmp_path: Path) -> None:
    copy = copy_of(unit, tmp_path)
    tenths = int(EXPOSURE_MAX[unit] * 10)
    done = analyze("security", "--offline=true", f"--threshold={tenths}", str(copy))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_unit_restarts_within_limits_and_drains_before_it_is_killed(unit: str) -> None:
    assert setting(unit, "Restart") == ["on-failure"]
    assert setting(unit, "StartLimitBurst")
    assert setting(unit, "Type") == ["notify"]
    assert setting(unit, "WatchdogSec")
    assert int(setting(unit, "TimeoutStopSec")[0]) > 10
    # Virtual machines outlive the daemon that keeps them.
    outlived = unit == "understudy-compute.service"
    assert setting(unit, "KillMode") == ["process" if outlived else "mixed"]
    assert setting(unit, "LimitCORE") == ["0"]


def test_agent_thaws_after_it_is_gone_with_the_configuration_that_it_ran_with() -> None:
    assert setting("understudy-agent.service", "ExecStopPost") == [
        *setting("understudy-agent.service", "ExecStart"),
        "thaw",
    ]


def test_nothing_is_made_on_a_disk_before_the_agent_thaws() -> None:
    """These folders are made anew before each command, also before that which thaws: on a frozen
    disk systemd would wait for it for ever. /run is in memory.
    """
    for name in ("State", "Cache", "Logs"):
        assert not setting("understudy-agent.service", f"{name}Directory")
    assert setting("understudy-agent.service", "RuntimeDirectoryPreserve") == ["yes"]


def test_users_of_the_units_are_those_that_sysusers_makes() -> None:
    made = re.findall(r"^u (\S+)", (FOLDER / "understudy.sysusers.conf").read_text(), re.MULTILINE)
    used = [setting(unit, "User") for unit in UNITS if unit not in ROOTS]
    assert sorted(made) == sorted(user for users in used for user in users)


@pytest.mark.parametrize("daemon", EXAMPLES)
def test_example_loads(daemon: str, tmp_path: Path) -> None:
    text = (FOLDER / "examples" / f"{daemon}.toml").read_text()
    path = tmp_path / f"{daemon}.toml"
    path.write_text(text.replace("00000000-0000-0000-0000-000000000000", str(uuid.uuid4())))
    config = EXAMPLES[daemon].load(str(path), {})
    assert config.model_dump()["service"]["health_port"]


@pytest.mark.parametrize("daemon", MODELS)
def test_unit_can_reach_what_its_example_names(daemon: str) -> None:
    """State lies in the unit's state folder; the configuration is the one that the unit names."""
    unit = f"understudy-{daemon}.service"
    assert f"/etc/understudy/{daemon}.toml" in setting(unit, "ExecStart")
    made = setting(unit, "StateDirectory") or [unit.removesuffix(".service")]
    state = f"/var/lib/{made[0]}"
    text = (FOLDER / "examples" / f"{daemon}.toml").read_text()
    named = re.findall(r'^(?:folder|store|state_folder|data_folder) = "(.*)"$', text, re.MULTILINE)
    assert named
    assert all(Path(path).is_relative_to(state) for path in named)


def test_points_are_mounted_where_the_drop_in_unmounts_them() -> None:
    text = (FOLDER / "examples" / "applier.toml").read_text()
    mount = re.search(r'^# points_mount = "(.*?)"', text, re.MULTILINE)
    assert mount
    drop_in = (FOLDER / "examples" / "points.conf").read_text()
    assert re.search(rf"^ExecStopPost=.* {re.escape(mount[1])}$", drop_in, re.MULTILINE)


def test_points_drop_in_leaves_nothing_that_makes_a_mount_namespace() -> None:
    """Inside one of its own, the applier's mount would never show on the host."""
    makes_one = re.compile(
        r"^(Protect(?:System|Home|Proc|Kernel\w+|ControlGroups|Hostname)|ProcSubset"
        r"|Private(?:Tmp|Devices|Users|Mounts))=",
        re.MULTILINE,
    )
    unit = makes_one.findall((FOLDER / "understudy-applier.service").read_text())
    drop_in = (FOLDER / "examples" / "points.conf").read_text()
    assert len(unit) > 8
    for name in unit:
        assert re.search(rf"^{name}=(?:no|default|all)$", drop_in, re.MULTILINE), name

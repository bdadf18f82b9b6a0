"""docs/OPERATIONS.md against the code: keys and defaults, errors, units, commands."""

from __future__ import annotations

import json
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from agents.mobility.config import AgentConfig
from agents.mobility.controlled_config import AgentControlConfig  # noqa: TC001 - pydantic needs it
from agents.mobility.tracker import KERNEL_MIN
from appliance.applier.config import ApplierConfig
from appliance.cli.commands import TABLE as COMMANDS
from appliance.config_server.config import ConfigServerConfig
from appliance.process_server.config import Config as ProcessServerConfig
from appliance.process_server.config import ListenConfig
from azure_emu.compute.config import ComputeConfig
from azure_emu.config import Config as AzureConfig
from azure_emu.config import Storage
from daemon.service import UNEXPECTED_EXIT_CODE
from replication.errors import ReplicationError
from vsphere_emu.config import Config as VsphereConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "OPERATIONS.md").read_text()


class AgentFile(AgentConfig):
    """All keys of an agent's file, with a config server and without."""

    control: AgentControlConfig


MODELS: dict[str, type[BaseModel]] = {
    "agent.toml": AgentFile,
    "process-server.toml": ProcessServerConfig,
    "applier.toml": ApplierConfig,
    "config-server.toml": ConfigServerConfig,
    "azure-emu.toml": AzureConfig,
    "compute.toml": ComputeConfig,
    "vsphere-emu.toml": VsphereConfig,
}


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(
        rf"^#+ (?:\d+\. )?{re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL
    )
    assert found, title
    return found[1]


def rows(text: str) -> list[list[str]]:
    """A table's rows below its heading."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may hold, also in a tuple or as an option."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        inner = models_in(field.annotation)
        for one in inner:
            yield from keys_of(one, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}", field


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.get_default(call_default_factory=True):
        case None:
            return "none"
        case bool(flag):
            return str(flag).lower()
        case str(text):
            return f'`"{text}"`'
        case ():
            return "`[]`"
        case tuple(values):
            return f"`{json.dumps(values)}`"
        case number:
            return f"`{number:.15g}`"


@pytest.mark.parametrize("name", MODELS)
def test_page_lists_each_key_with_its_default_and_no_other(name: str) -> None:
    told = {key.strip("`"): (default, meaning) for key, default, meaning in rows(section(name))}
    assert {key: default for key, (default, _) in told.items()} == {
        key: default_of(field) for key, field in keys_of(MODELS[name])
    }
    assert all(meaning for _, meaning in told.values())


def errors_below(base: type[ReplicationError]) -> Iterator[type[ReplicationError]]:
    yield base
    for below in base.__subclasses__():
        yield from errors_below(below)


def test_page_lists_each_error_with_its_code_and_exit_code() -> None:
    expected = {
        (f"`{error.__name__}`", f"`{error.code}`", str(error.exit_code))
        for error in errors_below(ReplicationError)
        if error.__module__ == "replication.errors"
    }
    told = {(name, code, number) for name, code, number, *_ in rows(section_of_errors())}
    assert told == expected | {("-", "-", str(UNEXPECTED_EXIT_CODE))}


def section_of_errors() -> str:
    return section("Exit codes and error codes")


def test_page_names_the_ports_and_the_kernel_of_the_code() -> None:
    storage = Storage.model_fields
    ports = section("Ports")
    for port in (
        ListenConfig().port,
        storage["blob_port"].default,
        storage["queue_port"].default,
    ):
        assert str(port) in ports
    assert f"Linux {KERNEL_MIN[0]}.{KERNEL_MIN[1]} or newer" in section("Requirements")


def test_page_names_each_unit_and_drop_in() -> None:
    folder = ROOT / "deploy" / "systemd"
    named = [path.stem for path in folder.glob("*.service")]
    named += [path.name for path in (folder / "examples").glob("*.conf")]
    assert len(named) > 5
    assert [name for name in named if name not in PAGE] == []


def test_commands_of_the_page_exist() -> None:
    commands = {entry.name for entry in COMMANDS}
    used = set(re.findall(r"^ +(?:us|understudy) ([a-z]+)", PAGE, re.MULTILINE))
    assert {"pki", "points", "export", "mount", "verify", "machines", "agent"} <= used
    assert used <= commands


def test_paths_of_the_page_are_there() -> None:
    named = set(re.findall(r"\b((?:docs|deploy)/[\w./-]*\w)", PAGE))
    assert len(named) > 3
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []

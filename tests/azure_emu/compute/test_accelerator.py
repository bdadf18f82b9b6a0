# ruff: noqa: ASYNC240 - nothing else runs on this loop

import time
from pathlib import Path

import pytest

from azure_emu.compute import accelerator
from azure_emu.compute.accelerator import PROBE_SECONDS_MAX, choose_accelerator, clear_probes
from azure_emu.compute.guest.build import default_folder


@pytest.mark.parametrize("named", ["kvm", "tcg"])
async def test_what_is_asked_for_by_name_is_taken(named: str, tmp_path: Path) -> None:
    assert await choose_accelerator(named, "/none", str(tmp_path)) == named  # type: ignore[arg-type]


async def test_without_the_device_there_is_emulation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(accelerator, "KVM", str(tmp_path / "none"))
    assert await choose_accelerator("auto", "/none", str(tmp_path)) == "tcg"


async def test_a_probe_ends_in_time_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever KVM is like here: a host that has none fails the probe as one whose KVM hangs."""
    monkeypatch.setattr(accelerator, "KVM", "/dev/null")
    began = time.monotonic()
    chosen = await choose_accelerator("auto", default_folder(), str(tmp_path))
    assert chosen in ("kvm", "tcg")
    assert time.monotonic() - began < PROBE_SECONDS_MAX + 30
    assert list(tmp_path.iterdir()) == []


async def test_what_a_killed_probe_has_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "probe-x").mkdir()
    (tmp_path / "vms").mkdir()
    await clear_probes(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["vms"]

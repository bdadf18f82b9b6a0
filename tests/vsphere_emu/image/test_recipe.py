import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from vsphere_emu.image.builder import default_recipe
from vsphere_emu.image.recipe import READY_MARKER, SERVICE, File, Recipe

OTHER: dict[str, Any] = {
    "suite": "trixie",
    "packages": ("udev",),
    "size_bytes": 2 << 30,
    "kernel_arguments": "root=/dev/vda1",
    "files": (File("/etc/hostname", "other\n"),),
    "enabled": (),
    "masked": (),
    "trimmed": (),
    "copied": (("/srv/code", "opt/code"),),
    "copied_stamp": "1",
    "script": "exit 1",
}


@pytest.mark.parametrize("name", [one.name for one in fields(Recipe)])
def test_stamp_is_over_every_ingredient(name: str) -> None:
    recipe = default_recipe()
    assert replace(recipe, **{name: OTHER[name]}).stamp != recipe.stamp
    assert default_recipe().stamp == recipe.stamp
    assert len(recipe.stamp) == 32


def test_mode_of_a_file_counts() -> None:
    recipe = Recipe(files=(File("/a", "x"),))
    assert replace(recipe, files=(File("/a", "x", 0o755),)).stamp != recipe.stamp


def test_machine_has_an_identity_of_its_own() -> None:
    assert len(default_recipe().machine_id) == 32
    assert default_recipe().machine_id != replace(default_recipe(), packages=()).machine_id


def test_scripts_are_those_of_a_shell_and_the_unit_runs_them() -> None:
    files = {one.path: one for one in Recipe().files}
    assert len(files) == len(Recipe().files)
    scripts = [one for one in files.values() if one.content.startswith("#!/bin/sh")]
    assert len(scripts) == 3
    for script in scripts:
        assert script.mode == 0o755
        subprocess.run(["sh", "-n"], input=script.content.encode(), check=True)
    units = "".join(one.content for one in files.values() if one.path.startswith("/etc/systemd"))
    for script in scripts:
        assert f"={script.path}\n" in units


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """The service's scripts, in a folder in the place of the root."""
    (tmp_path / "state").mkdir()
    (tmp_path / "run").mkdir()
    for one in Recipe().files:
        if one.path.startswith("/usr/local/lib"):
            text = one.content.replace(f"/var/lib/{SERVICE}", f"{tmp_path}/state")
            text = text.replace("/run/", f"{tmp_path}/run/")
            text = text.replace("/dev/console", f"{tmp_path}/console")
            script = tmp_path / Path(one.path).name
            script.write_text(text)
            script.chmod(0o755)
    return tmp_path


def begin(machine: Path) -> str:
    subprocess.run([machine / "begin"], check=True)
    return (machine / "console").read_text().strip()


def answer(machine: Path) -> str:
    done = subprocess.run(
        [machine / "answer"],
        input=b"GET /any HTTP/1.1\r\nHost: it\r\n\r\n",
        check=True,
        capture_output=True,
        timeout=20,
    )
    return done.stdout.decode()


def test_each_start_is_counted_and_told(machine: Path) -> None:
    assert begin(machine) == f"{READY_MARKER} generation=1 counter=0"
    (machine / "state" / "log.1").write_text("5 tick\n6 tick\n")
    assert begin(machine) == f"{READY_MARKER} generation=2 counter=6"
    (machine / "state" / "log").write_text("7 tick\n8 tick\n9 ti")
    assert begin(machine) == f"{READY_MARKER} generation=3 counter=8"


def test_answer_is_http_and_says_what_there_is(machine: Path) -> None:
    (machine / "state" / "log").write_text("7 tick\n8 tick\n")
    begin(machine)
    head, _, body = answer(machine).partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert f"Content-Length: {len(body)}" in head
    assert body == '{"service": "understudy-service", "generation": 1, "first": 8, "counter": 8}'


def test_work_goes_on_from_the_last_whole_number(machine: Path) -> None:
    log = machine / "state" / "log"
    log.write_text("7 tick\n8 tick\n9 ti")
    begin(machine)
    subprocess.run(["timeout", "0.5", machine / "work"], check=False)
    assert log.read_text().startswith("7 tick\n8 tick\n9 ti\n9 tick\n")

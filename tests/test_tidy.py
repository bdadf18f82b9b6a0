"""Rules of the repository that no linter knows."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agents", "appliance", "azure_emu", "vsphere_emu", "replication", "daemon", "deploy")
LINES_MAX = 500
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}


def python_files(*folders: str) -> list[Path]:
    """What git knows of or would take, so that nothing that is ignored counts."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\0")
    return [ROOT / name for name in listed if name.endswith(".py") and (ROOT / name).exists()]


REPLICATION = [path for path in python_files("replication") if path.name != "__init__.py"]


def test_the_rules_have_something_to_rule_over() -> None:
    assert len(REPLICATION) >= 12
    assert len(python_files(*PACKAGES, "tests")) > 30


@pytest.mark.parametrize("path", REPLICATION, ids=lambda path: path.stem)
def test_replication_knows_no_socket_file_clock_or_loop(path: Path) -> None:
    banned = {
        "asyncio", "socket", "ssl", "select", "selectors", "time", "datetime", "random", "secrets",
        "pathlib", "io", "tempfile", "shutil", "subprocess", "signal", "multiprocessing",
        "concurrent", "aiohttp", "azure", "structlog", "logging", "sys", "fcntl", "mmap",
    }  # fmt: skip
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
        if isinstance(node, ast.Name):
            assert node.id not in {"open", "print", "input", "eval", "exec"}
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "os" or (path.stem, node.attr) == ("envelope", "urandom")
            assert (node.value.id, node.attr) != ("uuid", "uuid1")
            assert (node.value.id, node.attr) != ("uuid", "uuid4")
    assert not imported & banned
    assert "os" not in imported or path.stem == "envelope"


@pytest.mark.parametrize("path", REPLICATION, ids=lambda path: path.stem)
def test_replication_has_mirrored_tests(path: Path) -> None:
    mirrored = ROOT / "tests" / path.relative_to(ROOT)
    assert mirrored.with_name(f"test_{path.stem}.py").exists()


def test_files_are_short_and_their_names_say_something() -> None:
    for path in python_files(*PACKAGES, "tests"):
        lines = path.read_text().count("\n")
        assert lines < LINES_MAX, f"{path.relative_to(ROOT)} has {lines} lines: split it"
        stem = path.stem.removeprefix("test_")
        assert stem not in VAGUE_NAMES, f"{path.relative_to(ROOT)}: name the one idea in it"


def test_test_folders_are_packages() -> None:
    """Two test files of the same name would otherwise be one module."""
    for path in python_files("tests"):
        assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py"

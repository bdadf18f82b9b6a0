"""Points for which applications come to rest, and captures that are given up."""

from __future__ import annotations

import os
import shutil
import stat
import threading
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agents.mobility.app_scripts import check_scripts
from agents.mobility.config import AppConsistencyConfig
from replication.bookmark import Consistency
from replication.errors import CaptureError, StorageError

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

    from agents.mobility.frame_builder import FrameContent
    from tests.agents.mobility.conftest import MakeLoopDisk

from tests.agents.mobility.capture_rig import SIZES, Machine, Meddled, Mount, mounter


@pytest.fixture
def source(machine: uuid.UUID, tmp_path: Path, opened: contextlib.ExitStack) -> Machine:
    return Machine(machine, tmp_path, opened)


@pytest.fixture
def mount(tmp_path: Path, opened: contextlib.ExitStack) -> Mount:
    return mounter(tmp_path, opened)


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def scripts(folder: Path, *, pre: str = "exit 0") -> AppConsistencyConfig:
    made = AppConsistencyConfig(
        pre=(script(folder, "pre", f"echo pre >> {folder}/told; {pre}"),),
        post=(script(folder, "post", f"echo post $(date +%s%N) >> {folder}/told"),),
        script_seconds_max=5,
    )
    check_scripts((*made.pre, *made.post))
    return made


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """Where nobody but root could have put a script."""
    folder = Path("/root") / f"scripts-{uuid.uuid4()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("ok", [True, False])
def test_scripts_decide_about_app_consistency(
    ok: bool, source: Machine, loop_disk: MakeLoopDisk, mount: Mount, own_folder: Path
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    (point / "file").write_bytes(b"x" * 9000)
    source.freezer = Meddled(source.freezer)
    app = scripts(own_folder, pre="exit 0" if ok else "echo busy; exit 3")
    taken = source.capture(app=app)
    told = (own_folder / "told").read_text().split()
    assert told[:2] == ["pre", "post"]
    assert len(told) == 3
    assert taken.pause_ns > 0
    if ok:
        assert (taken.consistency, taken.reason) == (Consistency.APP, "")
    else:
        assert taken.consistency is Consistency.CRASH
        assert "exit code 3: busy" in taken.reason
    source.capture()
    assert source.loses_nothing()


def test_applications_go_on_as_soon_as_the_file_systems_do(
    source: Machine, loop_disk: MakeLoopDisk, mount: Mount, own_folder: Path
) -> None:
    """Also when the freeze fails, and though sending what is left takes its time."""
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    app = scripts(own_folder)
    source.freezer = Meddled(source.freezer)
    slow: list[int] = []

    def when_sending(content: FrameContent) -> None:
        if (own_folder / "told").exists() and "post" in (own_folder / "told").read_text():
            slow.append(len(content.extents))

    for fails in (False, True):
        (own_folder / "told").unlink(missing_ok=True)
        slow.clear()
        (point / "file").write_bytes(os.urandom(90_000))
        if fails:
            source.freezer.before_freeze = lambda: (_ for _ in ()).throw(CaptureError("no"))
        taken = source.capture(app=app, on_add=when_sending)
        assert taken.consistency is (Consistency.NONE if fails else Consistency.APP)
        assert slow, "what was frozen is sent after the applications go on"
        assert (own_folder / "told").read_text().count("post") == 1


@pytest.mark.parametrize("when", ["at once", "in scripts", "frozen"])
def test_capture_that_is_given_up_ends_and_thaws(
    when: str, source: Machine, loop_disk: MakeLoopDisk, mount: Mount, own_folder: Path
) -> None:
    disk = loop_disk(SIZES["ext4"])
    point = mount(disk, "ext4")
    source.protect(disk)
    source.seed()
    (point / "file").write_bytes(b"x" * 90_000)
    os.sync()
    aborted = threading.Event()
    source.freezer = Meddled(source.freezer)
    app = scripts(own_folder)
    if when == "at once":
        aborted.set()
    elif when == "in scripts":
        threading.Timer(0.3, aborted.set).start()
        app = scripts(own_folder, pre="sleep 0.6")
    else:
        source.freezer.while_frozen = lambda: (_ for _ in ()).throw(StorageError("a bad sector"))
    with pytest.raises(StorageError if when == "frozen" else CaptureError):
        source.capture(app=app, aborted=aborted)
    told = (own_folder / "told").read_text() if when != "at once" else ""
    assert told.count("pre") == told.count("post") == (0 if when == "at once" else 1)
    source.freezer.while_frozen = lambda: None
    if when == "frozen":
        source.freezer.thaw()
    (point / "other").write_bytes(b"y")
    source.capture()
    assert source.received.blocks(0)
    source.capture()
    assert source.loses_nothing()

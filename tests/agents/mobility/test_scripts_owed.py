"""An agent that is killed between pre and post scripts: the applications go on all the same."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from replication.control.report import Phase
from tests.agents.mobility.conftest import MakeLoopDisk
from tests.agents.mobility.control_rig import ControlRig, control_rig

MIB = 1 << 20


@pytest.fixture
def own_folder() -> Iterator[Path]:
    """Where nobody but root could have put a script."""
    folder = Path("/root") / f"scripts-{uuid.uuid4()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def script(folder: Path, name: str, body: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def with_scripts(rig: ControlRig, folder: Path) -> None:
    pre = script(folder, "pre", f"touch {folder}/held; [ ! -e {folder}/hang ] || sleep 100")
    post = script(folder, "post", f"rm -f {folder}/held; echo ran >> {folder}/posts")
    rig.configure(more=f'[app_consistency]\npre = ["{pre}"]\npost = ["{post}"]')


async def killed_in_pre(rig: ControlRig, folder: Path) -> None:
    (folder / "hang").touch()
    rig.start()
    await rig.until("the application is held", (folder / "held").exists)
    rig.kill()
    (folder / "hang").unlink()
    assert (folder / "held").exists()
    assert (rig.state / str(rig.machine) / "post.due").exists()


@pytest.mark.parametrize("after", ["next start", "thaw"])
async def test_post_runs_after_a_kill(
    after: str, tmp_path: Path, own_folder: Path, loop_disk: MakeLoopDisk
) -> None:
    loop = loop_disk(4 * MIB)
    async with control_rig(tmp_path) as rig:
        await rig.enrol()
        with_scripts(rig, own_folder)
        rig.protect(loop, app_interval_seconds=0.5)
        rig.start()
        await rig.reported("an app-consistent point", lambda told: told.app_consistent_ns)
        await rig.stop()
        assert not (own_folder / "held").exists()
        await killed_in_pre(rig, own_folder)
        if after == "thaw":
            assert await rig.run("thaw") == (0, "post scripts were owed and have run\n")
        else:
            rig.control.assign(app_interval_seconds=0.0)
            rig.start()
            await rig.reported("it runs", lambda told: told.phase is Phase.REPLICATING)
        assert not (own_folder / "held").exists()
        assert not (rig.state / str(rig.machine) / "post.due").exists()

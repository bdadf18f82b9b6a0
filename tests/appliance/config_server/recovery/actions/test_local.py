"""Scripts on this host: real processes, which hang, flood, fork and are refused."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from appliance.config_server.recovery.actions.local import run_local
from appliance.config_server.recovery.actions.tail import TAIL_BYTES_MAX, Tail
from tests.appliance.config_server.recovery.actions.orders import (
    MACHINE,
    RUN,
    VM,
    runner,
    script,
    write_program,
)

ROOT = Path(__file__).parents[5]


def sessions_with(mark: str) -> list[str]:
    """Processes whose command line has ``mark``."""
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            told = Path("/proc", pid, "cmdline").read_bytes()
        except OSError:
            continue
        if mark.encode() in told:
            found.append(pid)
    return found


async def until_gone(mark: str) -> None:
    async with asyncio.timeout(20):
        while sessions_with(mark):  # noqa: ASYNC110 - the kernel tells of no process's end
            await asyncio.sleep(0.02)


async def test_a_program_gets_the_context_as_runbooks_do_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of the daemon")
    write_program(tmp_path / "scripts/net", "show", '#!/bin/sh\ncat\nenv\necho "$1|$2"\npwd\n')
    outcome = await runner(tmp_path).run(script({"command": "net/show 'a b' c"}, attempt=3))
    assert outcome.succeeded
    assert outcome.exit_code == 0
    told, _, rest = outcome.output.partition("\n")
    context = json.loads(told)
    assert {key: value for key, value in context.items() if key != "VmMap"} == {
        "RecoveryPlanName": "shop",
        "FailoverType": "Test",
        "FailoverDirection": "PrimaryToSecondary",
        "GroupId": "2",
        "ActionName": "an action",
        "Place": "after",
        "Attempt": 3,
        "RunId": str(RUN),
    }
    assert context["VmMap"][str(VM)] == {
        "SubscriptionId": "",
        "ResourceGroupName": "azure-1",
        "CloudServiceName": "",
        "RoleName": "db-1",
        "RecoveryPointId": "p1",
        "MachineId": str(MACHINE),
        "GroupId": "1",
        "State": "up",
        "Address": "10.0.0.5",
    }
    assert rest.endswith(f"a b|c\n{tmp_path}/scripts\n")
    assert "SECRET" not in rest


@pytest.mark.parametrize(
    ("text", "code", "detail"),
    [("exit 7", 7, "exit code 7"), ("kill -TERM $$", -15, "signal 15"), ("true", 0, "")],
)
async def test_the_exit_code_decides(tmp_path: Path, text: str, code: int, detail: str) -> None:
    outcome = await runner(tmp_path).run(script({"inline": f"echo said; {text}"}))
    assert outcome.succeeded == (code == 0)
    assert outcome.exit_code == code
    assert detail in outcome.detail
    assert outcome.output == "said\n"


async def test_a_script_that_hangs_is_ended_with_all_that_it_began(tmp_path: Path) -> None:
    mark = f"3600.{os.getpid()}1"
    hanging = f"trap '' TERM; sleep {mark} & echo begun; sleep {mark}"
    began = time.monotonic()
    outcome = await runner(tmp_path).run(script({"inline": hanging}, seconds_max=1))
    assert 0.9 < time.monotonic() - began < 15
    assert not outcome.succeeded
    assert outcome.exit_code is None
    assert "had not ended after 1 s" in outcome.detail
    assert outcome.output == "begun\n"
    await until_gone(mark)


async def test_what_a_script_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    mark = f"3600.{os.getpid()}2"
    outcome = await runner(tmp_path).run(script({"inline": f"sleep {mark} & echo done"}))
    assert outcome.succeeded, outcome
    assert outcome.output == "done\n"
    await until_gone(mark)


async def test_whoever_cancels_leaves_no_process(tmp_path: Path) -> None:
    mark = f"3600.{os.getpid()}3"
    task = asyncio.create_task(runner(tmp_path).run(script({"inline": f"sleep {mark}; true"})))
    async with asyncio.timeout(20):
        while not sessions_with(mark):  # noqa: ASYNC110 - nor of its beginning
            await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_gone(mark)


async def test_a_gigabyte_of_output_is_read_and_its_end_kept(tmp_path: Path) -> None:
    flood = "head -c 1073741824 /dev/zero; echo; echo the end"
    outcome = await runner(tmp_path).run(script({"inline": flood}, seconds_max=120))
    assert outcome.succeeded, outcome.detail
    assert outcome.output.endswith("\nthe end\n")
    assert outcome.output.startswith("(1073676297 bytes before this are left out)\n")
    assert len(outcome.output) < TAIL_BYTES_MAX + 100
    assert "\0" not in outcome.output


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("../outside", "is not below"),
        ("/bin/true", "is not below"),
        ("link", "is not below"),
        ("absent", "there is no file"),
        ("plain", "not executable"),
        ("folder", "no file"),
        ("open/program", "others than root may write"),
        ("theirs", "others than root may write"),
        ("'", "cannot be read"),
    ],
)
async def test_programs_that_are_not_the_administrators_are_refused(
    tmp_path: Path, command: str, told: str
) -> None:
    scripts = tmp_path / "scripts"
    write_program(tmp_path, "outside", "#!/bin/sh\n")
    (write_program(scripts, "plain", "")).chmod(0o644)
    (scripts / "link").symlink_to(tmp_path / "outside")
    (scripts / "folder").mkdir()
    write_program(scripts / "open", "program", "#!/bin/sh\n")
    (scripts / "open").chmod(0o777)
    os.chown(write_program(scripts, "theirs", "#!/bin/sh\n"), 65534, 65534)
    outcome = await runner(tmp_path).run(script({"command": command}))
    assert not outcome.succeeded
    assert told in outcome.detail


async def test_a_folder_that_others_may_rename_is_refused(tmp_path: Path) -> None:
    write_program(tmp_path / "open/scripts", "program", "#!/bin/sh\n")
    (tmp_path / "open").chmod(0o777)
    acting = runner(tmp_path, scripts_folder=str(tmp_path / "open/scripts"))
    outcome = await acting.run(script({"command": "program"}))
    assert not outcome.succeeded
    assert "a folder that it is in" in outcome.detail
    (tmp_path / "open").chmod(0o1777)
    assert (await acting.run(script({"command": "program"}))).succeeded


@pytest.mark.parametrize(
    ("config", "spec", "told"),
    [
        ({"allow_inline_scripts": False}, {"inline": "true"}, "no inline scripts"),
        ({"scripts_folder": None}, {"command": "x"}, "runs no scripts"),
        ({}, {"command": "x", "where": "moon"}, "another version"),
    ],
)
async def test_what_the_configuration_does_not_allow_is_refused(
    tmp_path: Path, config: dict[str, Any], spec: dict[str, Any], told: str
) -> None:
    outcome = await runner(tmp_path, **config).run(script(spec))
    assert not outcome.succeeded
    assert told in outcome.detail


async def test_a_program_that_cannot_be_started_is_an_outcome(tmp_path: Path) -> None:
    write_program(tmp_path / "scripts", "broken", "#!/no/such/interpreter\n")
    outcome = await runner(tmp_path).run(script({"command": "broken"}))
    assert (outcome.succeeded, outcome.exit_code) == (False, 127)
    assert "No such file" in outcome.output


ESCAPES = """
"$1" -c '
import os, sys, time
for _ in range(3):
    if os.fork():
        os._exit(0)
    os.setsid()
os.closerange(0, 64)
while True:
    with open(sys.argv[1], "ab", 0) as file:
        file.write(b".")
    time.sleep(0.001)
' "$2" &
"""
"""A daemon as in the books: twice forked, in sessions of its own, with no file of its parents."""


def escaping(folder: Path, then: str) -> tuple[list[str], Path]:
    """A program that begins a daemon, which writes on and on to a file, and then does something."""
    written = folder / "written"
    text = f'{ESCAPES}\nwhile [ ! -s "$2" ]; do :; done; {then}'
    return ["/bin/sh", "-c", text, "sh", sys.executable, str(written)], written


async def is_still(path: Path) -> bool:
    """Whether nobody writes there any more."""
    before = os.path.getsize(path)  # noqa: ASYNC240 - of a few bytes
    await asyncio.sleep(0.2)
    return 0 < before == os.path.getsize(path)  # noqa: ASYNC240


async def test_who_leaves_the_session_is_gone_at_the_time_limit(tmp_path: Path) -> None:
    words, written = escaping(tmp_path, "trap '' TERM; echo begun; sleep 3600")
    (tmp_path / "scripts").mkdir(exist_ok=True)
    program = write_program(tmp_path / "scripts", "escape", "#!/bin/sh\n" + words[2])
    command = f"{program.name} {words[4]} {written}"
    outcome = await runner(tmp_path).run(script({"command": command}, seconds_max=3))
    assert "had not ended after 3 s" in outcome.detail
    assert outcome.output == "begun\n"
    assert await is_still(written)
    assert not sessions_with(str(written))


async def test_who_leaves_the_session_is_gone_when_the_program_ends(tmp_path: Path) -> None:
    words, written = escaping(tmp_path, "echo done; exit 3")
    output = Tail()
    assert await run_local(words, stdin=b"", folder="/", output=output) == 3
    assert output.text() == "done\n"
    assert await is_still(written)
    assert not sessions_with(str(written))


async def test_who_leaves_the_session_is_gone_after_a_cancel_and_a_second_one(
    tmp_path: Path,
) -> None:
    words, written = escaping(tmp_path, "sleep 3600")
    task = asyncio.create_task(run_local(words, stdin=b"", folder="/", output=Tail()))
    async with asyncio.timeout(20):
        while not written.exists():  # noqa: ASYNC110 - the script tells nobody else
            await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await is_still(written)
    assert not sessions_with(str(written))


async def test_the_program_is_as_if_nobody_were_above_it(tmp_path: Path) -> None:
    """What it inherits of signals and files is what it got from this daemon."""
    output = Tail()
    text = "cat; grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd | wc -l"
    text += '; ps -o sid= -p $$ | grep -qw $$ && echo leads; echo "$#" >&2'
    words = ["/bin/sh", "-c", text, "sh", "a b"]
    assert await run_local(words, stdin=b"given\n", folder=str(tmp_path), output=output) == 0
    given, blocked, ignored, *rest = output.text().splitlines()
    assert (given, rest) == ("given", ["4", "leads", "1"])
    assert int(blocked.split()[1], 16) == 0
    changed = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGCHLD, signal.SIGTERM)
    assert int(ignored.split()[1], 16) & sum(1 << (number - 1) for number in changed) == 0


async def test_a_script_dies_with_the_daemon_that_runs_it(tmp_path: Path) -> None:
    """It would go on beside the next attempt."""
    words, written = escaping(tmp_path, "sleep 3600")
    text = (
        "import asyncio\n"
        "from appliance.config_server.recovery.actions.local import run_local\n"
        "from appliance.config_server.recovery.actions.tail import Tail\n"
        f"asyncio.run(run_local({words!r}, stdin=b'', folder='/', output=Tail()))\n"
    )
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", text)
    try:
        async with asyncio.timeout(60):
            while not written.exists():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        daemon.kill()
        await daemon.wait()
    await until_gone(str(written))
    assert await is_still(written)


async def test_it_holds_for_a_daemon_without_privileges(tmp_path: Path) -> None:
    """Another user, no new privileges, /proc with its own processes alone: as the unit has it. The
    one capability lets it read this interpreter.
    """
    folder = tmp_path / "own"
    folder.mkdir()
    for each in (*list(tmp_path.parents)[:3], tmp_path):
        each.chmod(each.stat().st_mode | 0o111)
    os.chown(folder, 65534, 65534)
    words, written = escaping(folder, "echo done; exit 4")
    text = (
        "import asyncio\n"
        "from appliance.config_server.recovery.actions.local import run_local\n"
        "from appliance.config_server.recovery.actions.tail import Tail\n"
        "output = Tail()\n"
        f"print(asyncio.run(run_local({words!r}, stdin=b'', folder='/', output=output)))\n"
        "print(output.text())\n"
    )
    kept = "-all,+dac_read_search"
    rights = f"--inh-caps={kept} --ambient-caps={kept} --bounding-set={kept}"
    daemon = await asyncio.create_subprocess_exec(
        *("unshare", "--mount", "--", "sh", "-c"),
        "mount -t proc -o hidepid=invisible,subset=pid proc /proc && exec setpriv --reuid=65534"
        f' --regid=65534 --clear-groups --no-new-privs {rights} -- "$0" -c "$1"',
        *(sys.executable, text),
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    said, _ = await daemon.communicate()
    assert said == b"4\ndone\n\n"
    assert await is_still(written)
    assert not sessions_with(str(written))

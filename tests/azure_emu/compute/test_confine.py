"""What a confined process can reach: nothing but what it is given. By a real process each."""

import os
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from azure_emu.compute import confine
from azure_emu.compute.confine import confined, landlock_version

ROOT = Path(__file__).parents[3]
QUICK_SECONDS = 0.1
"""What confining may add to the start of a process."""

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A host in small: two VMs' folders, points, the guest."""
    for name in ("vm/disk", "vm/vm.json", "other/disk", "points/point", "points/other", "guest/k"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def run(place: Path, script: str, *, search: bool = False) -> subprocess.CompletedProcess[str]:
    """A perl program, confined as a VM's process is, in the VM's folder."""
    command = confined(
        ["perl", "-e", script],
        read=[str(place / "guest/k"), "/proc/self/status", "/usr/share/perl"],
        write=["disk"],
        opened=[(20, str(place / "points/point"))],
        search=search,
    )
    return subprocess.run(
        command, cwd=place / "vm", capture_output=True, text=True, check=False, timeout=60
    )


def opens(place: Path, path: Path | str, how: str = "<", **options: bool) -> str:
    """What comes of opening a file: empty, or why it is refused."""
    script = f"open(my $f, '{how}', '{path}') or print $!"
    done = run(place, script, **options)
    assert done.returncode == 0, done
    return done.stdout


def test_it_opens_what_it_is_given(place: Path) -> None:
    assert opens(place, place / "guest/k") == opens(place, "disk", "+<") == ""
    assert run(place, "open(my $f, '<&=20'); print <$f>").stdout == "points/point"
    assert run(place, "open(my $f, '+<', 'disk'); print $f 'new'; truncate($f, 3)").stderr == ""
    assert (place / "vm/disk").read_text() == "new"


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        *("/etc/shadow", "/etc/passwd", "/root", "/proc/1/environ", "/dev/mem", "/dev/net/tun"),
        *("vm.json", "../other/disk", "../points/other", "../points/point"),
    ],
)
def test_it_reads_nothing_else(place: Path, path: str, *, search: bool) -> None:
    if path.startswith("/dev/mem") and not Path(path).exists():
        path = "/dev/full"
    how = f"open(my $f, '<', '{path}') or opendir(my $d, '{path}') or print $!"
    assert run(place, how, search=search).stdout in ("Permission denied", "Not a directory")


@pytest.mark.parametrize(
    "path",
    [
        *("vm.json", "new", "../other/disk", "../points/point", "../guest/k", "../guest/new"),
        *("/etc/passwd", "/tmp/understudy-confined", "/usr/lib/new", "/usr/bin/new"),
    ],
)
def test_it_writes_nothing_else(place: Path, path: str) -> None:
    for how in (">>", "+<", ">"):
        assert opens(place, path, how) in (
            *("Permission denied", "Operation not permitted"),
            *(["No such file or directory"] if how == "+<" else []),
        )
    assert (place / "guest/k").read_text() == "guest/k"
    assert not Path("/tmp/understudy-confined").exists()


@pytest.mark.parametrize(
    "act",
    [
        "chmod 04777, 'disk'",
        "chmod 0666, '../other/disk'",
        "chown 65534, 65534, 'disk'",
        "truncate '../other/disk', 0",
        "truncate 'disk', 0",
        "unlink 'disk'",
        "unlink '../other/disk'",
        "rename 'disk', 'elsewhere'",
        "link 'disk', 'elsewhere'",
        "symlink '/etc/shadow', 'elsewhere'",
        "mkdir 'elsewhere'",
        "utime 1, 1, '../other/disk'",
        "kill 0, getppid()",
        "kill 'CONT', getppid()",
        "kill 0, -1",
        "socket(my $s, 1, 1, 0)",
        "socket(my $s, 2, 1, 0)",
        "socket(my $s, 2, 2, 0)",
        "exec '/bin/true'",
        "syscall(165, my $a = 'x', my $b = 'y', my $c = 'tmpfs', 0, 0) == 0",
        "syscall(272, 0x10000000) == 0",
        "syscall(101, 16, getppid(), 0, 0) == 0",
        "syscall(302, getppid(), 7, 0, 0) == 0",
        "syscall(425, 1, 0) >= 0",
    ],
)
def test_it_acts_on_nothing_else(place: Path, act: str) -> None:
    """Calls that open nothing: links, modes, other processes, services, namespaces."""
    done = run(place, f"no warnings; if ({act}) {{ print 'done' }} else {{ print 0 + $! }}")
    assert done.stdout in ("1", "13"), done  # EPERM, EACCES
    assert (place / "other/disk").read_text() == "other/disk"
    assert (place / "other/disk").stat().st_mode & 0o777 == 0o644
    assert sorted(os.listdir(place / "vm")) == ["disk", "vm.json"]


def test_it_has_no_capability_and_gets_none(place: Path) -> None:
    told = run(place, "open(my $f, '<', '/proc/self/status'); print <$f>").stdout
    status = dict(line.split(":\t") for line in told.splitlines() if ":\t" in line)
    sets = {name: int(status[name], 16) for name in status if name.startswith("Cap")}
    assert sets == dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"), 0)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


def test_a_tool_keeps_only_what_finds_a_file_in_other_users_folders(place: Path) -> None:
    script = "open(my $f, '<', '/proc/self/status'); print grep { /^CapPrm|^CapBnd/ } <$f>"
    told = run(place, script, search=True).stdout.split()
    assert [int(told[1], 16), int(told[3], 16)] == [1 << 2, 1 << 2]
    os.chown(place / "guest", 65534, 65534)
    (place / "guest").chmod(0o700)
    assert opens(place, place / "guest/k", search=True) == ""
    assert opens(place, place / "guest/k") == "Permission denied"


def test_the_unit_has_the_capabilities_that_this_takes(place: Path) -> None:
    unit = ROOT / "deploy/systemd/understudy-compute.service"
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit.read_text(), re.MULTILINE)
    kept = ",".join(["-all", *(f"+{name[4:].lower()}" for name in line.split())])
    for search in (False, True):
        command = confined(["perl", "-e", "print 1"], search=search)
        bounded = ["setpriv", f"--bounding-set={kept}", "--no-new-privs", "--", *command]
        done = subprocess.run(bounded, capture_output=True, text=True, check=False, cwd=place)
        assert (done.returncode, done.stdout) == (0, "1"), done


def test_an_older_kernels_rights_do_as_well(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12 has version 2."""
    text = Path(confine.__file__).read_text()
    older = place / "older.py"
    for version in (1, 2, 3, 4, 5):
        line = "if version := landlock_version():"
        assert line in text
        older.write_text(text.replace(line, f"if version := {version}:"))
        monkeypatch.setattr(confine, "__file__", str(older))
        assert opens(place, "/etc/shadow") == "Permission denied"
        assert opens(place, place / "other/disk", ">") == "Operation not permitted"
        assert opens(place, place / "guest/k") == ""
        assert (place / "other/disk").read_text() == "other/disk"


def test_without_landlock_the_rest_holds(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(confine.__file__).read_text()
    without = place / "without.py"
    without.write_text(text.replace("if version := landlock_version():", "if version := 0:"))
    monkeypatch.setattr(confine, "__file__", str(without))
    assert opens(place, "/etc/passwd") == ""
    (place / "points").chmod(0)
    os.chown(place / "points", 65534, 65534)
    test_it_has_no_capability_and_gets_none(place)


def test_a_socket_that_is_given_is_answered_at(place: Path) -> None:
    """Its file is its owner's alone; a stale one is replaced."""
    path = place / "vm/qmp.sock"
    path.write_text("stale")
    script = "open(my $l, '+<&=10'); accept(my $c, $l); syswrite($c, 'here')"
    command = confined(["perl", "-e", script], listening=(10, "qmp.sock"))
    process = subprocess.Popen(command, cwd=path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            _until(path.is_socket)
            client.settimeout(30)
            _until(lambda: client.connect_ex(str(path)) == 0)
            assert client.recv(10) == b"here"
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        process.kill()
        process.wait()


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_cannot_be_given_is_told_and_nothing_is_run(place: Path) -> None:
    for wrong in (
        confined(["perl", "-e", "print 1"], opened=[(20, str(place / "absent"))]),
        confined(["no-such-program"]),
        confined(["perl", "-e", "print 1"], tap=(11, "no-such-interface-at-all")),
    ):
        done = subprocess.run(wrong, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (confine.CANNOT, "")
        assert done.stderr.startswith("cannot be confined: ")


def test_a_start_takes_hardly_longer() -> None:
    """Of a CPU's time, which the machine's load does not change much."""

    def seconds(command: list[str]) -> float:
        before = os.times()
        subprocess.run(command, check=True)
        now = os.times()
        return (
            now.children_user
            + now.children_system
            - before.children_user
            - (before.children_system)
        )

    alone = min(seconds(["/usr/bin/true"]) for _ in range(5))
    assert min(seconds(confined(["true"])) for _ in range(5)) - alone < QUICK_SECONDS


def test_this_machine_has_landlock() -> None:
    assert landlock_version() >= 1

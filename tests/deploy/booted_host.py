"""A host that systemd has booted: this machine's files under an overlay, in a container of its own.

The project lies in /opt/understudy as docs/OPERATIONS.md §4 has it, with its Python where units may
read it. There is no network but the host's own loopback, one disk (a loop device), the kernel's
bpffs, FUSE and taps. Nothing that is written stays, and nothing of it is seen by this machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]
INSTALLED = "/opt/understudy"
OVERLAY_BYTES = 2 << 30
DISK_BYTES = 256 << 20
BOOT_SECONDS_MAX = 120
COMMAND_SECONDS_MAX = 300
END_SECONDS_MAX = 30
REBOOT_SECONDS_MAX = 120
DEVICES = ("/dev/fuse", "/dev/net/tun")
ALLOWED_CALLS = (
    "bpf perf_event_open landlock_create_ruleset landlock_add_rule landlock_restrict_self"
)
"""The container keeps these from its programs; a machine's kernel does not."""

ALONE = """
for path in $groups; do echo $$ >"$path/cgroup.procs"; done
awk '{ print $5 }' /proc/self/mountinfo | tac | while read -r place; do
    case $place in
        / | /proc | /proc/* | /sys | /sys/* | /dev | /dev/* | /run | "$folder"/*) ;;
        *) umount --lazy "$(printf %b "$place")" ;;
    esac
done
exec "$@"
"""
"""A container keeps what is mounted when it starts, unseen, as long as it lives: whatever else runs
here could not let go of its loop devices and network namespaces. So it starts where it sees none.
"""

PATH = f"{INSTALLED}/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.strip()


class BootedHost:
    """environment: of what is run there. disk: a loop device with nothing on it."""

    def __init__(self, start: Callable[[], subprocess.Popen[bytes]], disk: str) -> None:
        self._start = start
        self.disk = disk
        self.environment: dict[str, str] = {}
        self._boot()

    def _boot(self) -> None:
        self._container = self._start()
        self._until_booted()
        # As udev does it.
        self.run("chmod", "0666", *DEVICES)

    def reboot(self) -> None:
        """As ``systemctl reboot`` does it, but for the kernel, which stays."""
        self.run("systemctl", "reboot", check=False)
        self._container.wait(REBOOT_SECONDS_MAX)
        self._boot()

    def run(self, *command: str, check: bool = True, given: str = "") -> str:
        """What a command that root runs there says. A failure shows all of it."""
        variables = {"PATH": PATH, "LANG": "C.UTF-8", "COLUMNS": "200", **self.environment}
        inside = ["nsenter", "--all", "--target", str(self._first()), "env", "--ignore-environment"]
        done = subprocess.run(
            [*inside, *(f"{name}={value}" for name, value in variables.items()), *command],
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            input=given,
            text=True,
            timeout=COMMAND_SECONDS_MAX,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def shell(self, script: str) -> str:
        return self.run("sh", "-e", "-c", script)

    def journal(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "--output=cat", "--unit", unit)

    def _until_booted(self) -> None:
        until = time.monotonic() + BOOT_SECONDS_MAX
        state = ""
        while state not in ("running", "degraded"):
            assert self._container.poll() is None, "the container has ended"
            assert time.monotonic() < until, f"not booted: {state}"
            time.sleep(0.2)
            with contextlib.suppress(IndexError, OSError):
                state = self.run("systemctl", "is-system-running", check=False).strip()

    def _first(self) -> int:
        """The container's first process."""
        pid = self._container.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return int(children.split()[0])


@contextlib.contextmanager
def booted_host(folder: Path) -> Iterator[BootedHost]:
    """folder: an empty one, for what is written; it is left empty."""
    with contextlib.ExitStack() as stack:
        memory, root = folder / "memory", folder / "root"
        for path in (memory, root):
            path.mkdir()
            stack.callback(path.rmdir)
        disk = stack.enter_context(_disk(folder))
        stack.enter_context(
            _mounted("-t", "tmpfs", "-o", f"size={OVERLAY_BYTES},mode=755", "tmpfs", memory)
        )
        stack.enter_context(_overlay(Path("/"), memory / "host", root))
        _prepare(root)
        stack.enter_context(_overlay(ROOT, memory / "project", root / INSTALLED[1:]))
        _install(root, memory / "environment")
        packages, environment = root / "opt/packages", root / INSTALLED[1:] / ".venv"
        stack.enter_context(_mounted("--bind", sysconfig.get_path("purelib"), packages))
        stack.enter_context(_mounted("--bind", sys.base_prefix, root / "opt/python"))
        stack.enter_context(_mounted("--bind", memory / "environment", environment))
        run("chroot", root, "ldconfig")
        yield BootedHost(stack.enter_context(_containers(root, disk)), disk)


def _prepare(root: Path) -> None:
    """None of this machine's services; a name, an id and a Python of the host's own."""
    shutil.rmtree(root / "etc/systemd/system", ignore_errors=True)
    (root / "etc/systemd/system").mkdir()
    for unit in ("systemd-networkd-wait-online.service", "getty.target"):
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "etc/hosts").write_text(
        "127.0.0.1 localhost appliance.example config.example ps.example\n"
    )
    (root / "etc/ld.so.conf.d/understudy.conf").write_text("/opt/python/lib\n")
    for place in ("python", "packages", "understudy"):
        shutil.rmtree(root / "opt" / place, ignore_errors=True)
        (root / "opt" / place).mkdir(parents=True)


def _install(root: Path, environment: Path) -> None:
    """An environment that finds the project and its packages at their new places."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    found, places = environment / "bin", environment / "lib" / version / "site-packages"
    found.mkdir(parents=True)
    places.mkdir(parents=True)
    (environment / "pyvenv.cfg").write_text("home = /opt/python/bin\n")
    (found / "python").symlink_to(f"/opt/python/bin/{version}")
    (places / "understudy.pth").write_text(f"{INSTALLED}\n/opt/packages\n")
    for script in Path(sysconfig.get_path("scripts")).glob("understudy*"):
        _, _, body = script.read_text().partition("\n")
        (found / script.name).write_text(f"#!{INSTALLED}/.venv/bin/python\n{body}")
        (found / script.name).chmod(0o755)
    assert list(found.glob("understudy-*")), "no daemon is installed"
    (root / INSTALLED[1:] / ".venv").mkdir(exist_ok=True)


@contextlib.contextmanager
def _mounted(*arguments: str | Path) -> Iterator[None]:
    run("mount", *arguments)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", arguments[-1]], check=False, capture_output=True)


@contextlib.contextmanager
def _overlay(below: Path, kept: Path, place: Path) -> Iterator[None]:
    """``below`` with what is written kept elsewhere; its top may be entered by everybody."""
    for name in ("upper", "work"):
        (kept / name).mkdir(parents=True, mode=0o755)
    layers = f"lowerdir={below},upperdir={kept / 'upper'},workdir={kept / 'work'}"
    with _mounted("-t", "overlay", "-o", layers, "overlay", place):
        yield


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[str]:
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    device = run("losetup", "--find", "--show", image)
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=False)
        image.unlink()


@contextlib.contextmanager
def _containers(root: Path, disk: str) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """What starts the container, again where it has ended; the last one is ended afterwards."""
    name = f"understudy-{os.getpid()}"
    # In a control group of its own: what it makes there goes with it.
    group = [Path("/sys/fs/cgroup") / tree / name for tree in ("systemd", "unified")]
    group = [path for path in group if path.parent.is_dir()]
    assert group, "no control group of systemd's at /sys/fs/cgroup"
    for path in group:
        path.mkdir()
    command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot"]
    command += [f"--directory={root}", f"--machine={name}", "--console=pipe", "--private-network"]
    command += ["--capability=all", f"--system-call-filter={ALLOWED_CALLS}"]
    command += [f"--bind={path}" for path in (*DEVICES, disk, "/sys/fs/bpf")]
    started = []

    def start() -> subprocess.Popen[bytes]:
        with (root.parent / "console").open("ab") as console:
            container = subprocess.Popen(
                ["unshare", "--mount", "--propagation=slave", "sh", "-c", ALONE, "sh", *command],
                env={**os.environ, "groups": " ".join(map(str, group)), "folder": str(root.parent)},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        started.append(container)
        return container

    try:
        yield start
    finally:
        for container in started[-1:]:
            container.send_signal(signal.SIGTERM)
            try:
                container.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                container.kill()
                container.wait()
        (root.parent / "console").unlink(missing_ok=True)
        for top in group:
            for below, _, _ in os.walk(top, topdown=False):
                with contextlib.suppress(OSError):  # one that still ends
                    Path(below).rmdir()
        shutil.rmtree(f"/run/systemd/nspawn/propagate/{name}", ignore_errors=True)

"""The units on a host that systemd has booted, set up as docs/OPERATIONS.md says: their sandboxes
leave them what they need, and whatever of them is killed comes back.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from agents.mobility.tracker.pins import remove_machine
from tests.deploy.booted_host import INSTALLED, BootedHost, booted_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNITS = ("config-server", "azure-emu", "applier", "process-server", "compute", "agent")
"""In the order of their first start."""

OWN_USER = ("config-server", "azure-emu", "applier", "process-server")
WAIT_SECONDS = 180
EXAMPLES = f"{INSTALLED}/deploy/systemd/examples"
PLAN = """name: small
groups:
  - name: one
    machines: [data-01]
    after:
      - name: note
        script: {command: note, seconds_max: 60}
"""
FREEZE = "fsfreeze --freeze /srv/data 2>&1 && echo frozen || true"
NOTE = """#!/bin/sh
grep -q '"RecoveryPlanName"' && id -un && touch /tmp/noted && echo noted
"""
SCRIPTS = {
    "pre": "set -e; runuser -u nobody -- id -un >/run/before",
    "post": "touch /run/after",
}
"""Of an app-consistent point: as another user, and into a folder that the drop-in names."""

APP_CONSISTENCY = """
[app_consistency]
pre = ["/etc/understudy/scripts/pre"]
post = ["/etc/understudy/scripts/post"]
"""

SINGLE_DISK = """
systemctl stop 'understudy-*'
mkdir /srv/data/lib
cp -a /var/lib/understudy-agent /srv/data/lib
mount --bind /srv/data/lib /var/lib
sed -i 's|^state_folder.*|state_folder = "/run/understudy-agent"|' /etc/understudy/agent.toml
systemctl start understudy-agent
"""
UNITS_AND_USERS = f"""
cd {INSTALLED}
install -m 644 deploy/systemd/understudy.sysusers.conf /usr/lib/sysusers.d/understudy.conf
systemd-sysusers
install -m 644 deploy/systemd/*.service /etc/systemd/system/
install -d -m 755 /etc/understudy
install -d /etc/systemd/system/understudy-applier.service.d
cp {EXAMPLES}/points.conf /etc/systemd/system/understudy-applier.service.d
install -d /etc/systemd/system/understudy-agent.service.d
cp {EXAMPLES}/app-scripts.conf /etc/systemd/system/understudy-agent.service.d
"""
STORAGE = """
cd /root
understudy pki init ca
understudy pki issue ca --out cache --server 127.0.0.1
umask 077
head -c 64 /dev/urandom | base64 -w0 >account.key
at=127.0.0.1
echo "DefaultEndpointsProtocol=https;AccountName=understudycache;AccountKey=$(cat account.key);\
BlobEndpoint=https://$at:10000/understudycache;QueueEndpoint=https://$at:10001/understudycache;" \
    >cache.connection
for part in process-server applier azure-emu; do
    install -d -m 700 -o understudy-$part -g understudy-$part /etc/understudy/$part
done
for part in process-server applier; do
    install -m 600 -o understudy-$part cache.connection cache/ca.pem /etc/understudy/$part
    mkdir -p -m 755 /etc/systemd/system/understudy-$part.service.d
    echo "[Service]
Environment=SSL_CERT_FILE=/etc/understudy/$part/ca.pem" \
        >/etc/systemd/system/understudy-$part.service.d/ca.conf
done
install -m 600 -o understudy-azure-emu account.key cache/certificate.pem cache/key.pem \
    /etc/understudy/azure-emu
head -c 32 /dev/urandom | base64 >/etc/understudy/config-server.unlock
chown understudy-config-server: /etc/understudy/config-server.unlock
systemctl daemon-reload
"""


def uncommented(text: str) -> str:
    return re.sub(
        r"^# (names|\[control\]|config_server|identity_folder|points_)",
        r"\1",
        text,
        flags=re.MULTILINE,
    )


def without(text: str, section: str) -> str:
    """A configuration without that section."""
    return re.sub(rf"^{re.escape(section)}\n(?:.+\n)*", "", text, flags=re.MULTILINE)


def controlled(name: str, text: str) -> str:
    """An example as the page says that it becomes one of a config server on this host."""
    if name == "config-server":
        text = text.replace('["appliance.example"]', '["appliance.example", "config.example"]')
        return text + '\n[recovery]\nscripts_folder = "/etc/understudy/scripts"\n'
    if name == "process-server":
        text = without(re.sub(r"^machines.*\n", "", uncommented(text), flags=re.MULTILINE), "[tls]")
        return text.replace("68719476736", "268435456")
    if name == "applier":
        return without(uncommented(text), "[[machines]]")
    if name == "agent":
        return text + APP_CONSISTENCY
    return text.replace("192.0.2.10", "127.0.0.1")


def put(host: BootedHost, path: str, text: str, *, mode: str = "600", owner: str = "root") -> None:
    host.run("install", "-m", mode, "-o", owner, "/dev/stdin", path, given=text)


def machines(host: BootedHost) -> dict[str, Any]:
    (found,) = json.loads(host.run("understudy", "machines", "--json"))
    assert isinstance(found, dict)
    return found


def newest(host: BootedHost) -> str:
    """The name of the newest recovery point in the folder of points."""
    return host.shell("readlink /var/lib/understudy/points/data-01/latest || true").strip()


def until(host: BootedHost, holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not holds():
        if time.monotonic() > end:
            told = host.run("understudy", "health", check=False)
            pytest.fail(f"{what}\n{told}\n{host.journal('understudy-*')[-8000:]}")
        time.sleep(0.5)


def pid_of(host: BootedHost, name: str) -> str:
    shown = host.run("systemctl", "show", "-p", "MainPID,ActiveState", f"understudy-{name}")
    values = dict(line.split("=", 1) for line in shown.split())
    return values["MainPID"] if values["ActiveState"] == "active" else ""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedHost]:
    """All units run, data-01 is enrolled, an operator is signed in."""
    with booted_host(tmp_path_factory.mktemp("booted")) as host:
        host.shell(UNITS_AND_USERS)
        host.shell(STORAGE)
        for name in UNITS:
            example = "agent-controlled" if name == "agent" else name
            text = controlled(name, host.run("cat", f"{EXAMPLES}/{example}.toml"))
            owner = f"understudy-{name}" if name in OWN_USER else "root"
            put(host, f"/etc/understudy/{name}.toml", text, owner=owner)
        host.run("install", "-d", "-m", "755", "/etc/understudy/scripts")
        put(host, "/etc/understudy/scripts/note", NOTE, mode="755")
        for name, body in SCRIPTS.items():
            put(host, f"/etc/understudy/scripts/{name}", f"#!/bin/sh\n{body}\n", mode="755")
        host.run("mkfs.ext4", "-q", host.disk)
        host.shell(f"mkdir /srv/data && mount {host.disk} /srv/data && date >/srv/data/date")

        server = ("understudy-config-server", "--config", "/etc/understudy/config-server.toml")
        for name in UNITS:
            config = f"/etc/understudy/{name}.toml"
            if name not in ("config-server", "azure-emu"):
                whose = () if name == "agent" else ("--for", "appliance")
                host.run(
                    *(f"understudy-{name}", "--config", config, "enrol", "--name"),
                    *("data-01" if name == "agent" else "here", "--passphrase-file", "-"),
                    given=host.run(*server, "passphrase", *whose).split()[-1],
                )
            started = host.run("systemctl", "enable", "--now", f"understudy-{name}", check=False)
            assert pid_of(host, name), f"{started}{host.journal(f'understudy-{name}')}"
        host.environment = {
            "UNDERSTUDY_URL": "https://config.example",
            "UNDERSTUDY_CA": "/var/lib/understudy/identity/ca.pem",
            "UNDERSTUDY_TOKEN": host.run(
                *("runuser", "-u", "understudy-config-server", "--", *server),
                *("token", "create", "ops", "--role", "contributor", "--days", "1"),
            ).split()[-1],
        }
        machine = machines(host)["id"]
        try:
            yield host
        finally:
            host.run("systemctl", "stop", "understudy-agent", check=False)
            remove_machine(uuid.UUID(machine))


def test_a_machine_is_protected_and_tried_and_what_is_killed_comes_back(host: BootedHost) -> None:
    host.run("understudy", "policies", "create", "gold", "--app-frequency", "1h")
    host.run("understudy", "protect", "data-01", "--policy", "gold", "--disk", host.disk, "--wait")
    assert "tracker ebpf" in host.run("understudy", "agent", "status")
    assert newest(host)
    scripts_bring_about_an_app_consistent_point(host)
    commands_of_root_leave_daemons_their_files(host)

    a_plan_with_a_script_passes(host)
    a_compute_node_that_restarts_keeps_its_virtual_machine(host)
    all_that_is_killed_comes_back_and_replicates(host)
    all_comes_up_after_a_reboot(host)
    a_machine_with_a_single_disk_is_thawed(host)


def scripts_bring_about_an_app_consistent_point(host: BootedHost) -> None:
    until(
        host,
        lambda: '"app"' in host.run("understudy", "points", "data-01", "--json"),
        "no app-consistent point",
    )
    assert host.shell("ls /run/after; cat /run/before").split() == ["/run/after", "nobody"]


def commands_of_root_leave_daemons_their_files(host: BootedHost) -> None:
    server = ("understudy-config-server", "--config", "/etc/understudy/config-server.toml")
    unlock = "/etc/understudy/config-server.unlock"
    host.run("cp", "--preserve=mode,ownership", unlock, f"{unlock}.new")
    host.run(*server, "reseal", f"{unlock}.new")
    host.run(*server, "token", "list")
    for name in OWN_USER:
        state = "understudy" if name == "applier" else f"understudy-{name}"
        assert (
            host.run("find", f"/var/lib/{state}", "-xdev", "!", "-user", f"understudy-{name}") == ""
        )


def a_plan_with_a_script_passes(host: BootedHost) -> None:
    put(host, "/root/plan.yaml", PLAN)
    host.run("understudy", "plans", "import", "/root/plan.yaml")
    host.run("understudy", "plans", "test", "small", "--wait")
    (run,) = json.loads(host.run("understudy", "plans", "runs", "small", "--json"))
    assert "noted" in host.run("understudy", "plans", "runs", "small", "--run", run["id"], "--json")


def a_compute_node_that_restarts_keeps_its_virtual_machine(host: BootedHost) -> None:
    def virtual_machines() -> list[str]:
        return host.run("pgrep", "qemu-system-x86", check=False).split()

    before = virtual_machines()
    assert len(before) == 1
    host.run("systemctl", "restart", "understudy-compute")
    assert virtual_machines() == before
    host.run("understudy", "plans", "cleanup", "small", "--wait")
    assert virtual_machines() == []


def all_that_is_killed_comes_back_and_replicates(host: BootedHost) -> None:
    before = {name: pid_of(host, name) for name in UNITS}
    until(host, lambda: "frozen" in host.shell(FREEZE), "cannot freeze")

    def is_back(name: str) -> bool:
        return pid_of(host, name) not in ("", before[name])

    for name in reversed(UNITS):
        whom = "main" if name == "compute" else "all"
        host.run("systemctl", "kill", "--signal=KILL", f"--kill-whom={whom}", f"understudy-{name}")
    # As the agent's own freezer would have left it, killed with it.
    host.run("timeout", "60", "touch", "/srv/data/thawed")
    until(host, lambda: all(is_back(name) for name in UNITS), "not all come back")
    until(host, lambda: newest(host), "no points are served")
    last = newest(host)
    host.shell("date >/srv/data/again; sync")
    until(host, lambda: newest(host) > last, "no newer recovery point")
    mounts = host.run("cat", "/proc/mounts")
    assert mounts.count(" /var/lib/understudy/points ") == 1
    until(
        host,
        lambda: "not well" not in host.run("understudy", "health", check=False),
        "away for long",
    )


def all_comes_up_after_a_reboot(host: BootedHost) -> None:
    """In whatever order; a kernel that has not gone remembers what has changed."""
    last = newest(host)
    host.reboot()
    host.run("mount", host.disk, "/srv/data")
    until(host, lambda: all(pid_of(host, name) for name in UNITS), "not all come up")
    host.shell("date >/srv/data/rebooted; sync")
    until(host, lambda: newest(host) > last, "no newer recovery point")
    status = host.run("understudy", "agent", "status")
    assert "replicating, tracker ebpf" in status
    assert "resync" not in host.journal("understudy-agent")


def a_machine_with_a_single_disk_is_thawed(host: BootedHost) -> None:
    """Its state is in memory; nothing may be written to the frozen disk before that which thaws."""
    host.shell(SINGLE_DISK)
    until(host, lambda: "frozen" in host.shell(FREEZE), "cannot freeze")
    try:
        host.run("systemctl", "kill", "--signal=KILL", "--kill-whom=all", "understudy-agent")
        host.run("timeout", "60", "touch", "/srv/data/thawed-again")
    finally:
        host.run("fsfreeze", "--unfreeze", "/srv/data", check=False)
    until(host, lambda: "had been left frozen" in host.journal("understudy-agent"), "not told")

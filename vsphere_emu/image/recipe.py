"""What the bootable image consists of: packages, files, kernel arguments. No file is touched here.

A recipe has a stamp over everything in it, by which built images are kept and found again.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field

PARTITION_OFFSET_BYTES = 1 << 20
SERVICE = "understudy-service"
SERVICE_PORT = 8080
SERVICE_FOLDER = f"/var/lib/{SERVICE}"
READY_MARKER = f"{SERVICE}: ready"
"""On the serial console once the service can be asked; ``generation=N counter=M`` follow."""

LOG_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class File:
    """A file of the image. path: absolute, in the image; mode: its permissions."""

    path: str
    content: str
    mode: int = 0o644


_BEGIN = f"""\
#!/bin/sh
# Counts this start of the machine, durably, and says on the console that the service can be asked.
set -eu
cd {SERVICE_FOLDER}
generation=$(($(cat generation 2>/dev/null || echo 0) + 1))
echo "$generation" >generation.new
sync generation.new
mv generation.new generation
sync .
counter=$(cat log.1 log 2>/dev/null | awk '/^[0-9]+ tick$/ {{ n = $1 }} END {{ print n + 0 }}')
echo "$counter" >/run/{SERVICE}.first
echo "{READY_MARKER} generation=$generation counter=$counter" >/dev/console
"""

_WORK = f"""\
#!/bin/sh
# Goes on counting where the log ends, each number made durable before the next.
set -eu
cd {SERVICE_FOLDER}
counter=$(cat /run/{SERVICE}.first)
while true; do
    counter=$((counter + 1))
    [ "$(stat -c %s log 2>/dev/null || echo 0)" -lt {LOG_BYTES_MAX} ] || mv log log.1
    # A number that a power cut has torn is on a line of its own.
    [ -z "$(tail -c 1 log 2>/dev/null)" ] || echo >>log
    echo "$counter tick" >>log
    sync log
    sleep 1
done
"""

_ANSWER = f"""\
#!/bin/sh
# Answers one HTTP request on standard input and output: RFC 9112, whatever the path is.
while IFS= read -r line; do
    case $line in "" | "$(printf '\\r')") break ;; esac
done
cd {SERVICE_FOLDER}
body=$(printf '{{"service": "{SERVICE}", "generation": %s, "first": %s, "counter": %s}}\\n' \\
    "$(cat generation)" "$(cat /run/{SERVICE}.first)" \\
    "$(cat log.1 log 2>/dev/null | awk '/^[0-9]+ tick$/ {{ n = $1 }} END {{ print n + 0 }}')")
printf 'HTTP/1.1 200 OK\\r\\nContent-Type: application/json\\r\\n'
printf 'Content-Length: %s\\r\\n' "${{#body}}"
printf 'Connection: close\\r\\n\\r\\n%s' "$body"
"""

_UNITS = (
    File(
        f"/etc/systemd/system/{SERVICE}.socket",
        f"""\
[Unit]
Description=Where the service is asked

[Socket]
ListenStream={SERVICE_PORT}
Accept=yes
MaxConnections=16

[Install]
WantedBy=sockets.target
""",
    ),
    File(
        f"/etc/systemd/system/{SERVICE}@.service",
        f"""\
[Unit]
Description=One answer of the service

[Service]
ExecStart=/usr/local/lib/{SERVICE}/answer
StandardInput=socket
StandardOutput=socket
StandardError=journal
RuntimeMaxSec=60
""",
    ),
    File(
        f"/etc/systemd/system/{SERVICE}-work.service",
        f"""\
[Unit]
Description=What the machine does
After=local-fs.target {SERVICE}.socket
Requires={SERVICE}.socket

[Service]
ExecStartPre=/usr/local/lib/{SERVICE}/begin
ExecStart=/usr/local/lib/{SERVICE}/work
StateDirectory={SERVICE}
Restart=on-failure

[Install]
WantedBy=multi-user.target
""",
    ),
)

_AGENT_UNITS = (
    File(
        "/etc/systemd/system/agent.mount",
        """\
[Unit]
Description=The disk that an agent comes on

[Mount]
What=/dev/disk/by-label/agent
Where=/agent
Type=ext4
Options=noatime

[Install]
WantedBy=dev-disk-by\\x2dlabel-agent.device
""",
    ),
    File(
        "/etc/systemd/system/understudy-agent.service",
        """\
[Unit]
Description=Understudy mobility agent, from a disk of its own
Requires=agent.mount
After=agent.mount systemd-networkd.service

[Service]
ExecStart=/agent/start
StandardOutput=append:/agent/agent.log
StandardError=append:/agent/agent.log
Restart=on-failure
RestartSec=3
LimitMEMLOCK=infinity
OOMScoreAdjust=-500

[Install]
WantedBy=agent.mount
""",
    ),
)
"""An agent's state must not lie on a disk that is frozen for each point. So a machine made of this
image finds it on a second disk, labelled ``agent``; started without one, it has no agent.
"""

_SYSTEM = (
    File("/etc/hostname", "boot-01\n"),
    File("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 boot-01\n::1 localhost ip6-localhost\n"),
    File("/etc/fstab", "LABEL=root / ext4 noatime,errors=remount-ro 0 1\n"),
    File("/etc/resolv.conf", ""),
    File(
        "/etc/systemd/network/50-any.network",
        "[Match]\nName=e*\n\n[Link]\nRequiredForOnline=no\n\n[Network]\nDHCP=yes\n",
    ),
    # An emulated processor on a busy host takes minutes where a real one takes a second: devices
    # that udev has not come to yet, such as the serial console, are waited for.
    File(
        "/etc/systemd/system.conf.d/50-patient.conf",
        "[Manager]\nDefaultDeviceTimeoutSec=900\nDefaultTimeoutStartSec=900\n",
    ),
    File("/etc/initramfs-tools/conf.d/understudy", "MODULES=list\n"),
    File(
        "/etc/initramfs-tools/modules",
        "virtio_pci\nvirtio_blk\nvirtio_scsi\nsd_mod\nnvme\next4\n",
    ),
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """An image's ingredients.

    packages:         beside those of debootstrap's minbase.
    size_bytes:       of the disk, sparse; one partition with the root file system fills it.
    kernel_arguments: of the boot loader's only entry.
    enabled, masked:  systemd units.
    trimmed:          what is removed at the end: paths below the root, with shell patterns.
    copied:           folders of this machine, and where in the image they go.
    copied_stamp:     a digest of what they hold.
    """

    suite: str = "bookworm"
    packages: tuple[str, ...] = (
        "linux-image-cloud-amd64",
        "systemd-sysv",
        "udev",
        "iproute2",
        "python3",
        "libbpf1",
    )
    size_bytes: int = 1 << 30
    kernel_arguments: str = (
        "root=LABEL=root ro net.ifnames=0 quiet console=tty0 console=ttyS0,115200"
    )
    files: tuple[File, ...] = (
        *_SYSTEM,
        *_UNITS,
        *_AGENT_UNITS,
        File(f"/usr/local/lib/{SERVICE}/begin", _BEGIN, 0o755),
        File(f"/usr/local/lib/{SERVICE}/work", _WORK, 0o755),
        File(f"/usr/local/lib/{SERVICE}/answer", _ANSWER, 0o755),
    )
    enabled: tuple[str, ...] = (
        "systemd-networkd.service",
        "agent.mount",
        "understudy-agent.service",
        f"{SERVICE}.socket",
        f"{SERVICE}-work.service",
    )
    masked: tuple[str, ...] = (
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "e2scrub_reap.service",
        "fstrim.timer",
        "systemd-networkd-wait-online.service",
    )
    trimmed: tuple[str, ...] = (
        "usr/share/doc/*",
        "usr/share/man/*",
        "usr/share/info/*",
        "usr/share/locale/*",
        "usr/share/lintian",
        "usr/share/bug",
        "var/cache/apt/*",
        "var/cache/debconf/*-old",
        "var/lib/apt/lists/*",
        "var/log/*.log",
        "var/log/apt/*",
        "boot/System.map-*",
    )
    copied: tuple[tuple[str, str], ...] = ()
    copied_stamp: str = ""
    script: str = field(default="", repr=False)

    @property
    def stamp(self) -> str:
        """32 hexadecimal digits over all of it."""
        told = json.dumps(asdict(self), sort_keys=True).encode()
        return hashlib.sha256(told).hexdigest()[:32]

    @property
    def machine_id(self) -> str:
        """For /etc/machine-id: without one, systemd would take each start for the first."""
        return hashlib.sha256(f"machine-id {self.stamp}".encode()).hexdigest()[:32]

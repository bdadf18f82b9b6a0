"""Builds the recovery guest: ``python -m azure_emu.compute.guest.build FOLDER``.

Debian's cloud kernel is fetched as a package and unpacked, never installed. The initramfs is made
of busybox, the checkers of this machine with their libraries, the kernel modules that are needed,
and ``init``. The image ``tools.img`` holds PostgreSQL and what a script may want besides. A stamp
tells what all of it was made from; without change nothing is built.
"""

import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import resources

KERNEL_PACKAGE = "linux-image-cloud-amd64"
KERNEL, INITRAMFS, TOOLS, STAMP = "vmlinuz", "initramfs", "tools.img", ".stamp"
MODULES = {
    "boot": ("virtio_pci", "virtio_blk"),
    "net": ("virtio_net",),
    "xfs": ("xfs",),
    "btrfs": ("btrfs",),
    "vfat": ("vfat", "nls_cp437", "nls_ascii", "nls_iso8859-1"),
}
"""Lists of modules, each loaded when it is needed: some take a second to start."""

CHECKERS = ("blkid", "e2fsck", "xfs_repair", "btrfs", "unshare")
TOOL_PROGRAMS = ("setpriv", "bash", "openssl", "sha256sum")
"""In the tools image, beside PostgreSQL and busybox."""

SOURCES = ("busybox-static", "e2fsprogs", "xfsprogs", "btrfs-progs", "util-linux", "libc6")
PROGRAM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
TOOLS_SPARE_BYTES = 16 << 20


def main() -> int:
    folder = sys.argv[1] if len(sys.argv) > 1 else default_folder()
    build(folder)
    return 0


def default_folder() -> str:
    """Where set-up builds it."""
    return str(resources.files("azure_emu.compute.guest") / "build")


def build(folder: str) -> None:
    """Make all parts anew unless the stamp says that nothing has changed."""
    os.makedirs(folder, exist_ok=True)
    stamp = os.path.join(folder, STAMP)
    wanted = _wanted()
    parts = [os.path.join(folder, name) for name in (KERNEL, INITRAMFS, TOOLS)]
    if all(map(os.path.exists, parts)) and _read(stamp) == wanted:
        return
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        kernel, modules = _unpack_kernel(scratch)
        _make_initramfs(scratch, modules)
        _make_tools(scratch)
        shutil.copyfile(kernel, os.path.join(scratch, KERNEL))
        for part in parts:
            os.replace(os.path.join(scratch, os.path.basename(part)), part)
    with open(stamp, "w", encoding="ascii") as file:
        file.write(wanted)


def _wanted() -> str:
    digest = hashlib.sha256()
    for name in ("build.py", "init"):
        digest.update((resources.files("azure_emu.compute.guest") / name).read_bytes())
    names = [*SOURCES, *(f"postgresql-{_version(path)}" for path in _postgresql())]
    digest.update(_run("dpkg-query", "-W", "-f", "${Package} ${Version}\n", *names).encode())
    return digest.hexdigest()


def _unpack_kernel(scratch: str) -> tuple[str, str]:
    """Paths of the kernel and of the folder that holds lib/modules."""
    depends = _run("apt-cache", "depends", KERNEL_PACKAGE)
    package = next(
        line.split()[-1] for line in depends.splitlines() if "Depends: linux-image" in line
    )
    _run("apt-get", "download", package, cwd=scratch)
    (archive,) = glob.glob(os.path.join(scratch, f"{package}_*.deb"))
    root = os.path.join(scratch, "kernel")
    _run("dpkg-deb", "-x", archive, root)
    (kernel,) = glob.glob(os.path.join(root, "boot", "vmlinuz-*"))
    _run("depmod", "-b", root, kernel.partition("vmlinuz-")[2])
    return kernel, root


def _make_initramfs(scratch: str, modules: str) -> None:
    root = os.path.join(scratch, "root")
    os.makedirs(os.path.join(root, "modules"))
    version = os.listdir(os.path.join(modules, "lib/modules"))[0]
    for name, wanted in MODULES.items():
        paths: list[str] = []
        for module in wanted:
            shown = _run("modprobe", "-d", modules, "-S", version, "--show-depends", module)
            lines = shown.splitlines()
            paths += [line.split()[1] for line in lines if line.startswith("insmod ")]
        loaded = []
        for path in dict.fromkeys(paths):
            target = os.path.join("/modules", os.path.basename(path))
            shutil.copyfile(path, root + target)
            loaded.append(target + "\n")
        with open(os.path.join(root, "modules", name), "w", encoding="ascii") as file:
            file.writelines(loaded)
    _copy_programs(map(_program, CHECKERS), root)
    _install_busybox(root)
    _copy_file(str(resources.files("azure_emu.compute.guest") / "init"), root, "/init")
    os.chmod(os.path.join(root, "init"), 0o755)  # noqa: S103 - as the kernel needs it
    listed = _run("find", ".", "-print0", cwd=root)
    with open(os.path.join(scratch, INITRAMFS), "wb") as file:
        command = ["cpio", "--quiet", "-o", "-0", "-H", "newc", "-R", "0:0"]
        subprocess.run(command, cwd=root, input=listed.encode(), stdout=file, check=True)


def _make_tools(scratch: str) -> None:
    root = os.path.join(scratch, "tools")
    for name in ("proc", "dev", "sys", "run", "tmp", "mnt", "etc", "bin", "usr/bin", "root"):
        os.makedirs(os.path.join(root, name))
    _copy_programs(map(_program, TOOL_PROGRAMS), root)
    _install_busybox(root)
    with open(os.path.join(root, "etc/passwd"), "w", encoding="ascii") as file:
        file.write("root:x:0:0::/root:/bin/sh\npostgres:x:104:104::/tmp:/bin/sh\n")
    with open(os.path.join(root, "etc/group"), "w", encoding="ascii") as file:
        file.write("root:x:0:\npostgres:x:104:\n")
    locale = "/usr/lib/locale/C.utf8"
    if os.path.isdir(locale):
        shutil.copytree(locale, root + locale)
    for path in _postgresql():
        shutil.copytree(path, root + path, ignore=shutil.ignore_patterns("bitcode", "llvmjit*"))
        share = f"/usr/share/postgresql/{_version(path)}"
        if os.path.isdir(share):
            shutil.copytree(share, root + share, ignore=shutil.ignore_patterns("man", "*.sample"))
        programs = [*glob.glob(f"{path}/bin/*"), *glob.glob(f"{path}/lib/*.so")]
        _copy_libraries([one for one in programs if "llvmjit" not in one], root)
    zones = "/usr/share/zoneinfo"
    if os.path.isdir(zones):
        for zone in ("UTC", "Etc/UTC"):
            _copy_file(f"{zones}/{zone}", root, f"{zones}/{zone}")
    size = int(_run("du", "-s", "-B1", root).split()[0]) * 5 // 4 + TOOLS_SPARE_BYTES
    image = os.path.join(scratch, TOOLS)
    with open(image, "wb") as file:
        file.truncate(size >> 20 << 20)
    options = ["-q", "-F", "-m", "0", "-O", "^has_journal", "-L", "tools"]
    _run("mkfs.ext4", *options, "-d", root, image)


_PLACES = ("bin", "sbin", "usr/bin", "usr/sbin")


def _install_busybox(root: str) -> None:
    """With a link for each of its programs that is not there in full."""
    _copy_file(_program("busybox"), root, "/bin/busybox")
    for name in _run(_program("busybox"), "--list").split():
        if not any(os.path.lexists(os.path.join(root, place, name)) for place in _PLACES):
            os.symlink("/bin/busybox", os.path.join(root, "bin", name))


def _postgresql() -> list[str]:
    """Folders of the PostgreSQL programs of this machine; none where it has none."""
    return sorted(glob.glob("/usr/lib/postgresql/[0-9]*"))


def _version(path: str) -> str:
    return os.path.basename(path)


def _copy_programs(programs: Iterable[str], root: str) -> None:
    programs = list(programs)
    for program in programs:
        _copy_file(program, root, program)
    _copy_libraries(programs, root)


def _copy_libraries(programs: Iterable[str], root: str) -> None:
    """What the dynamic linker would load, at the same paths."""
    done = subprocess.run(["ldd", *programs], check=False, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        words = line.replace("=>", " ").split()
        for word in words:
            if word.startswith("/") and not word.endswith(":"):
                _copy_file(word, root, word)
                break


def _copy_file(source: str, root: str, target: str) -> None:
    path = root + target
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        shutil.copy(os.path.realpath(source), path)


def _program(name: str) -> str:
    found = shutil.which(name, path=PROGRAM_PATH)
    if found is None:
        raise SystemExit(f"{name} is not installed; deploy/setup installs it")
    return found


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _run(*command: str, cwd: str | None = None) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
